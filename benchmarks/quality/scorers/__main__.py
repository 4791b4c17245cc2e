"""`python -m benchmarks.quality.scorers`."""

import sys

from benchmarks.quality.scorers.command import main

if __name__ == "__main__":
    sys.exit(main())
