# What the scripts have in common that build a bundle and measure it on one GPU; they source this with
#
#   name            of the script's results: they and the log go to build/$name
#   all_parts       that it has, the first of which is bundle
#   default_parts   those that run if none are named
#   precision       of the bundle
#
# and use $out, $bundle, $backend, is_asked, run, build_bundle, measure and summary.

cd "$(dirname "$0")/.." || exit 1
asked=${*:-$default_parts}
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
    onnxruntime_cuda) target=${TARGET:-cpu} precision=${PRECISION:-fp16} ;;
    *) echo "BACKEND $backend; there are: inductor, tensorrt, tensorrt_rtx, onnxruntime_cuda" >&2; exit 2 ;;
esac
out=$(realpath -m "${OUT:-build/$name}")
bundle=${BUNDLE:-$out/bundle}
mkdir -p "$out" || exit 1
python=${PYTHON:-python3}
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PACKAGES:+:$PACKAGES}${PYTHONPATH:+:$PYTHONPATH}"
log=$out/${name}_on_gpu.log
: >"$log"
failed=""

is_asked() { case " $asked " in *" $1 "*) ;; *) return 1 ;; esac; }

# run PART SECONDS COMMAND...
run() {
    local part=$1 seconds=$2 start=$SECONDS status
    shift 2
    echo "== $part: $*" | tee -a "$log"
    timeout --kill-after=20 "$seconds" "$@" >"$out/$part.log" 2>&1
    status=$?
    cat "$out/$part.log" >>"$log"
    tail -n 12 "$out/$part.log" | cut -c 1-400
    echo "== $part: exit $status, $((SECONDS - start)) s" | tee -a "$log"
    if [ "$status" -ne 0 ]; then failed="$failed $part"; fi
    return "$status"
}

# Inductor compiles for minutes; a build that was ended goes on where it was when it is asked for again.
build_bundle() {
    run bundle 570 "$python" -m export.build --base sd15 --weights random --precision "$precision" \
        --only denoiser,subject_encoder,vae_encoder,vae_decoder,text_encoder,context_projector \
        --target "$target" --out "$bundle" || exit 1
}

# measure PART SECONDS MODULE OPTION...: it is told to end before it would be ended, and what it wrote is copied.
measure() {
    local part=$1 seconds=$2 module=$3 minutes results
    shift 3
    minutes=$(awk "BEGIN { print ($seconds - 30) / 60 }")
    run "$part" "$seconds" "$python" -m "$module" --bundle "$bundle" --backend "$backend" --minutes "$minutes" \
        --out "${name}_gpu_$part" "$@"
    results=$(grep '^/.*\.json$' "$out/$part.log" | tail -n 1)
    if [ -f "$results" ]; then cp "$results" "$out/"; fi
}

# summary PART...: the end of what each of them said, and the exit code.
summary() {
    local part
    echo "== summary ($SECONDS s; log and results in $out)"
    for part in "$@"; do
        if is_asked "$part"; then echo "$part:"; grep -v '^/' "$out/$part.log" | tail -n 10 | cut -c 1-400; fi
    done
    if [ -n "$failed" ]; then
        echo "failed:$failed"
        exit 1
    fi
}
