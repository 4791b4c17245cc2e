#!/usr/bin/env bash
# The first call on a GPU machine that is available for minutes; see `python3 -m benchmarks.gpu.lease --help`.
#   [REHEARSE=1] bash benchmarks/gpu/lease.sh [STEP]...
# PYTHON: the interpreter (default: python3).
cd "$(dirname "$0")/../.." || exit 1
exec "${PYTHON:-python3}" -m benchmarks.gpu.lease first "$@"
