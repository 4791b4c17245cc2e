"""Benchmarks for a GPU machine that is available for minutes: `lease.sh`, `lease_2.sh`, and a module for each step."""
