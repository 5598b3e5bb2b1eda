#!/usr/bin/env bash
# All that issue-sized GPU checks need, in one call:  bash benchmarks/gpu/measure.sh FOLDER [SECONDS]
# Each part has a time limit and fails alone; texts and numbers go to FOLDER, a short table is printed last.
# SHORT=1 takes two minutes: kernels at 8 and 24 MB, a transformer of 4 + 8 blocks of FLUX.1-dev's size, the tests.
cd "$(dirname "$0")/../.." || exit 1
out=${1:?usage: measure.sh FOLDER [SECONDS]}
end=$((SECONDS + ${2:-195}))
layers="19 38"
if [ -n "$SHORT" ]; then
    end=$((SECONDS + ${2:-120})) layers="4 8"
    KERNEL_OPTIONS="--sizes 8 24 --no-variants $KERNEL_OPTIONS" FLUX_OPTIONS="--pairs 2 $FLUX_OPTIONS"
fi
python=${PYTHON:-python3}
wheels=${WHEELS:-.whl}
site=$(mktemp -d)
mkdir -p "$out"
export PYTHONUNBUFFERED=1 PYTHONWARNINGS=ignore PYTHONPATH=.:$site HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
if ls "$wheels"/*.whl >/dev/null 2>&1; then
    "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$site" "$wheels"/*.whl \
        2>&1 | grep -v WARNING
fi

part() { # name, limit in seconds, command...
    local name=$1 limit=$2 left=$((end - SECONDS - 3)) start=$SECONDS
    shift 2
    [ "$left" -lt "$limit" ] && limit=$left
    [ "$limit" -lt 10 ] && { echo "$name: no time left" | tee -a "$out/summary.txt"; return; }
    timeout -k 3 "$limit" "$@" >"$out/$name.txt" 2>&1
    echo "$name: exit $? after $((SECONDS - start)) s of $limit" >>"$out/summary.txt"
}

: >"$out/summary.txt"
rm -f "$site/free"
part kernels "${KERNELS:-65}" "$python" -m benchmarks.kernels --json "$out/kernels.json" $KERNEL_OPTIONS
part flux "${FLUX:-95}" "$python" -m benchmarks.gpu.flux --layers $layers --json "$out/flux.json" $FLUX_OPTIONS
# compiling takes no device: it runs beside the tests, and times nothing before they are through
[ -n "$SHORT" ] || part inductor "${INDUCTOR:-110}" "$python" -m benchmarks.gpu.flux --backend inductor --layers 4 8 --after "$site/free" \
    --json "$out/inductor.json" $FLUX_OPTIONS &
part tests "${TESTS:-60}" "$python" -m pytest -q -m gpu -n 8 -p no:cacheprovider --tb=short tests/test_kernels.py \
    tests/test_ops.py tests/test_direct.py tests/test_on_gpu.py tests/test_torch_compile.py tests/test_memory.py tests/test_host_reads.py
touch "$site/free"
wait

{
    echo "== kernels"; grep -v -i warn "$out/kernels.txt" | cut -c1-170
    echo "== flux of $layers blocks, eager"; grep -v -i -E "warn|only in the" "$out/flux.txt" | tail -32 | cut -c1-300
    [ -z "$SHORT" ] && echo "== flux of 4 + 8 blocks, inductor" && grep -v -i warn "$out/inductor.txt" | tail -14 | cut -c1-300
    echo "== tests"; tail -25 "$out/tests.txt" | cut -c1-200
    echo "== parts"; cat "$out/summary.txt"
    echo "all: $SECONDS s"
} 2>&1 | tee "$out/table.txt"
rm -f "$out/table.txt"
