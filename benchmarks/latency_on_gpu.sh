#!/usr/bin/env bash
# Latency of whole requests on one GPU against PyTorch, at SD1.5's real geometry with random weights: 50 guided DDIM
# steps at 512x512 and 4 LCM steps without guidance. No network is needed. Each part writes its JSON when it ends, and one
# that fails does not keep the next from running; the tables come last. Where a command may take ten minutes, three do it:
# `bundle`, which takes the longest with inductor; `ddim lcm`; and `compiled`, the baseline that takes minutes to compile.
#
#   BACKEND=inductor bash benchmarks/latency_on_gpu.sh [bundle|ddim|lcm|compiled]...     (default: bundle ddim lcm)
#
# BACKEND: of the runtime: inductor needs PyTorch and nothing else; tensorrt and tensorrt_rtx need their libraries;
#     onnxruntime_cuda needs onnxruntime-gpu and no engines (default: inductor).
# TARGET: what export.build is to build engines for, as its --target (default: what BACKEND says for this GPU).
# BUNDLE: folder of the bundle; one that is complete is used as it is (default: build/latency/bundle).
# PRECISION: of the bundle (default: bf16, that of the baselines, or fp16 for onnxruntime_cuda, which lacks operators for
#     bf16). REPEATS: samples of each (default: 10).
# OUT: folder for the log and the results (default: build/latency). PYTHON: the interpreter (default: python3).
# PACKAGES: folders with unpacked wheels of what python3 lacks, separated by colons: diffusers, onnxscript, onnx_ir.
# MOMA_RT_COMMIT: the commit, where the checkout has no history.
set -u

name=latency
all_parts="bundle ddim lcm compiled"
default_parts="bundle ddim lcm"
precision=${PRECISION:-bf16}
. "$(dirname "$0")/on_gpu.sh"

# latency PART SECONDS OPTION...
latency() {
    measure "$1" "$2" benchmarks.latency --context-embedding random --repeats "${REPEATS:-10}" "${@:3}"
}

if is_asked bundle; then build_bundle; fi
if is_asked ddim; then latency ddim 190 --steps 50 --baselines eager,plain; fi
if is_asked lcm; then latency lcm 120 --steps 4 --scheduler lcm --baselines eager,plain; fi
if is_asked compiled; then latency compiled 560 --steps 50 --baselines compiled; fi
summary ddim lcm compiled
