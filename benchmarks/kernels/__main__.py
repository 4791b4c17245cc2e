"""Runs `python -m benchmarks.kernels`."""

import sys

from benchmarks.kernels.command import main

if __name__ == "__main__":
    sys.exit(main())
