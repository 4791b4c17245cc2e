"""Measurements. Each module is one command; its JSON goes to benchmarks/results, and the README quotes only that."""
