#!/usr/bin/env bash
# The whole proof of the kernels on one GPU, in under ten minutes: tests, compute-sanitizer, PTX by the driver, speed,
# and other launches. Needs python3 with torch, Triton and pytest, and for some stages compute-sanitizer and
# cuda-bindings; no network. A stage that fails does not keep the next from running; a short summary comes last.
#
#   bash benchmarks/kernels_on_gpu.sh [tests|sanitizer|ptx|speed|tuning]...     (default: all)
#
# OUT: folder for the log and the results (default: build/gpu). PYTHON: the interpreter (default: python3).
# MOMA_RT_COMMIT: the commit, where the checkout has no history. MINUTES: of the speed stage (default: 3.5).
set -u

cd "$(dirname "$0")/.." || exit 1
all_stages="tests sanitizer ptx speed tuning"
asked=${*:-$all_stages}
for stage in $asked; do
    case " $all_stages " in
        *" $stage "*) ;;
        *) echo "no stage '$stage'; there are: $all_stages" >&2; exit 2 ;;
    esac
done
python=${PYTHON:-python3}
if ! "$python" -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then
    echo "$python has no PyTorch that sees a CUDA GPU" >&2
    exit 2
fi
out=$(realpath -m "${OUT:-build/gpu}")
mkdir -p "$out" || exit 1
work=$(mktemp -d) || exit 1
trap 'rm -rf "$work"' EXIT
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
: >"$out/kernels_on_gpu.log"

is_asked() { case " $asked " in *" $1 "*) ;; *) return 1 ;; esac; }

note() { printf '%-12s %s\n' "$1" "$2" >>"$work/summary"; }

# run NAME SECONDS COMMAND...
run() {
    local name=$1 seconds=$2 status verdict start=$SECONDS
    shift 2
    timeout --kill-after=20 "$seconds" "$@" >"$work/$name.log" 2>&1
    status=$?
    { echo "== $name"; tail -n 12 "$work/$name.log"; } | cut -c 1-400
    if [ "$status" -eq 0 ]; then verdict=pass; else verdict="FAIL (exit $status)"; fi
    note "$name" "$verdict, $((SECONDS - start)) s: $(tail -n 1 "$work/$name.log" | cut -c 1-90)"
    return "$status"
}

# keep NAME...: what ran of these, whole.
keep() {
    local name
    for name in "$@"; do
        if [ -f "$work/$name.log" ]; then { echo "== $name"; cat "$work/$name.log"; } >>"$out/kernels_on_gpu.log"; fi
    done
}

tests() {
    run tests 240 "$python" -m pytest -m gpu -q -p no:cacheprovider tests/kernels --ignore tests/kernels/test_ptx_on_gpu.py
}

ptx() { run ptx 240 "$python" -m pytest -m gpu -q -p no:cacheprovider tests/kernels/test_ptx_on_gpu.py; }

sanitizer() {
    if ! command -v compute-sanitizer >/dev/null; then
        note sanitizer "skipped: there is no compute-sanitizer"
        return
    fi
    # Compiles what the sanitized runs then find in Triton's cache.
    run launches 120 "$python" -m benchmarks.sanitized_launches || return
    local tool
    for tool in memcheck racecheck; do
        run "$tool" 120 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
            compute-sanitizer --tool "$tool" --error-exitcode 9 "$python" -m benchmarks.sanitized_launches
    done
}

# measure NAME SECONDS OPTION...: what it writes is copied, and the end of what it prints is kept for the summary.
measure() {
    local name=$1 results
    run "$name" "$2" "$python" -m benchmarks.kernels "${@:3}"
    keep "$name"
    results=$(grep '^/.*\.json$' "$work/$name.log" | tail -n 1)
    if [ -f "$results" ]; then cp "$results" "$out/"; fi
    sed -n '/^attention of one step/,$p; /LaunchConfig(/p' "$work/$name.log" | grep -v '^/' >>"$work/tables"
}

# What times nothing shares the GPU.
for stage in tests sanitizer ptx; do
    if is_asked "$stage"; then "$stage" & fi
done
wait
keep tests launches memcheck racecheck ptx
if is_asked speed; then
    run timer 60 "$python" -m pytest -m gpu -q -p no:cacheprovider tests/benchmarks
    keep timer
    measure speed 300 --minutes "${MINUTES:-3.5}"
fi
if is_asked tuning; then measure tuning 240 --tune; fi

touch "$work/summary" "$work/tables"
echo "== summary ($SECONDS s, log and results in $out)"
cat "$work/summary" "$work/tables" | tee -a "$out/kernels_on_gpu.log"
! grep -q FAIL "$work/summary"
