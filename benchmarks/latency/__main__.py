"""Runs `python -m benchmarks.latency`."""

import sys

from benchmarks.latency.command import main

if __name__ == "__main__":
    sys.exit(main())
