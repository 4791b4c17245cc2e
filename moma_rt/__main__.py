"""`python -m moma_rt` is the `moma-rt` command."""

import sys

from moma_rt.cli import entry

sys.exit(entry())
