#!/usr/bin/env bash
# Latency of whole requests on one GPU against PyTorch, at SD1.5's real geometry with random weights, in under ten
# minutes: 50 guided DDIM steps at 512x512 and 4 LCM steps without guidance, then the compiled baseline, which takes the
# longest to start. No network is needed. Each part writes its JSON when it ends, and one that fails does not keep the
# next from running; the tables come last.
#
#   BACKEND=inductor bash benchmarks/latency_on_gpu.sh [bundle|ddim|lcm|compiled]...     (default: all)
#
# BACKEND: of the runtime, one that has engines for this GPU: inductor needs PyTorch and nothing else; tensorrt and
#     tensorrt_rtx need their libraries (default: inductor).
# TARGET: what export.build is to build engines for, as its --target (default: what BACKEND says for this GPU).
# BUNDLE: folder of the bundle; one that is complete is used as it is (default: build/latency/bundle).
# PRECISION: of the bundle (default: bf16, that of the baselines). REPEATS: samples of each (default: 10).
# OUT: folder for the log and the results (default: build/latency). PYTHON: the interpreter (default: python3).
# PACKAGES: folders with unpacked wheels of what python3 lacks, separated by colons: diffusers, onnxscript, onnx_ir.
# MOMA_RT_COMMIT: the commit, where the checkout has no history.
set -u

cd "$(dirname "$0")/.." || exit 1
all_parts="bundle ddim lcm compiled"
asked=${*:-$all_parts}
for part in $asked; do
    case " $all_parts " in
        *" $part "*) ;;
        *) echo "no part '$part'; there are: $all_parts" >&2; exit 2 ;;
    esac
done
backend=${BACKEND:-inductor}
case "$backend" in
    inductor) target=${TARGET:-inductor} ;;
    tensorrt | tensorrt_rtx) target=${TARGET:-local} ;;
    *) echo "BACKEND $backend; there are: inductor, tensorrt, tensorrt_rtx" >&2; exit 2 ;;
esac
out=$(realpath -m "${OUT:-build/latency}")
bundle=${BUNDLE:-$out/bundle}
mkdir -p "$out" || exit 1
python=${PYTHON:-python3}
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PACKAGES:+:$PACKAGES}${PYTHONPATH:+:$PYTHONPATH}"
log=$out/latency_on_gpu.log
: >"$log"
failed=""

is_asked() { case " $asked " in *" $1 "*) ;; *) return 1 ;; esac; }

# run NAME SECONDS COMMAND...
run() {
    local name=$1 seconds=$2 start=$SECONDS status
    shift 2
    echo "== $name: $*" | tee -a "$log"
    timeout --kill-after=20 "$seconds" "$@" >"$out/$name.log" 2>&1
    status=$?
    cat "$out/$name.log" >>"$log"
    tail -n 12 "$out/$name.log" | cut -c 1-400
    echo "== $name: exit $status, $((SECONDS - start)) s" | tee -a "$log"
    if [ "$status" -ne 0 ]; then failed="$failed $name"; fi
    return "$status"
}

# measure NAME SECONDS OPTION...: what it writes is copied.
measure() {
    local name=$1 results=latency_gpu_$1
    run "$name" "$2" "$python" -m benchmarks.latency --bundle "$bundle" --backend "$backend" \
        --context-embedding random --out "$results" "${@:3}" && cp "benchmarks/results/$results.json" "$out/"
}

repeats=${REPEATS:-10}
if is_asked bundle; then
    run bundle 240 "$python" -m export.build --base sd15 --weights random --precision "${PRECISION:-bf16}" \
        --only denoiser,subject_encoder,vae_encoder,vae_decoder,text_encoder,context_projector \
        --target "$target" --out "$bundle" || exit 1
fi
if is_asked ddim; then measure ddim 100 --steps 50 --repeats "$repeats" --baselines eager,plain; fi
if is_asked lcm; then measure lcm 70 --steps 4 --scheduler lcm --repeats "$repeats" --baselines eager,plain; fi
if is_asked compiled; then
    # Within what is left of the ten minutes.
    measure compiled $((SECONDS < 540 ? 580 - SECONDS : 40)) --steps 50 --repeats "$repeats" --baselines compiled
fi

echo "== summary ($SECONDS s; log and results in $out)"
for part in ddim lcm compiled; do
    if is_asked "$part" && [ -f "$out/$part.log" ]; then echo "$part:"; grep -v '^/' "$out/$part.log" | tail -n 8; fi
done
if [ -n "$failed" ]; then
    echo "failed:$failed"
    exit 1
fi
