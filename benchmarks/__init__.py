"""Benchmarks. Each is a command that writes JSON to benchmarks/results; the README quotes only numbers from there."""
