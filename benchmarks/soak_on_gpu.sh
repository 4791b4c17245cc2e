#!/usr/bin/env bash
# A long mixed run of one runtime on one GPU, at SD1.5's real geometry with random weights: 1000 requests from 8 threads,
# each picture compared with the one made alone, and the GPU's memory watched. No network is needed. The JSON is written
# also where the run fails for what it found; the table comes last. Where a command may take ten minutes, two do it.
#
#   BACKEND=inductor bash benchmarks/soak_on_gpu.sh [bundle|mixed]...     (default: both)
#
# BACKEND, TARGET, PYTHON, PACKAGES, MOMA_RT_COMMIT: as for latency_on_gpu.sh. OUT: default build/soak.
# BUNDLE: folder of the bundle; one that is complete is used as it is (default: build/soak/bundle). That of
#     latency_on_gpu.sh will do: BUNDLE=build/latency/bundle bash benchmarks/soak_on_gpu.sh mixed
# PRECISION: of the bundle (default: fp16; bf16 rounds eight times as coarsely, so that batches differ more).
# REQUESTS, THREADS, MAX_BATCH: default 1000, 8, 4. TOLERANCE: of a picture, in steps of 1/255 (default: what suits the
#     precision).
set -u

name=soak
all_parts="bundle mixed"
default_parts=$all_parts
precision=${PRECISION:-fp16}
. "$(dirname "$0")/on_gpu.sh"

if is_asked bundle; then build_bundle; fi
if is_asked mixed; then
    # Of this time, what it makes alone first takes a part.
    measure mixed 570 benchmarks.soak --requests "${REQUESTS:-1000}" --threads "${THREADS:-8}" \
        --max-batch "${MAX_BATCH:-4}" ${TOLERANCE:+--tolerance "$TOLERANCE"}
fi
summary mixed
