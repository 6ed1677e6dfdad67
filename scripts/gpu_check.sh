#!/usr/bin/env bash
# Everything that needs a GPU, in one command and without network: build, tests, sanitizers, benchmarks, summary.
#   scripts/gpu_check.sh [OUT]     results and log under OUT (default runs/gpu_check); under 9 minutes on one H200
# Needs python with torch for CUDA, timm, pybind11, cmake, ninja, pytest, and nvcc. A step that fails or runs out of time
# does not stop the next ones; each leaves its result, so a run that is cut off is worth reading. Exit status: 0 if all
# steps passed. MVP_GPU_SECONDS (default 530) is the time for all of it.
set -uo pipefail
cd "$(dirname "$0")/.."
root=$PWD
out=${1:-runs/gpu_check}
mkdir -p "$out"
out=$(cd "$out" && pwd)
log=$out/log.txt
: > "$log"
total=${MVP_GPU_SECONDS:-530}
failed=()
SECONDS=0

# step NAME LIMIT COMMAND…: at most LIMIT seconds, and never past the end of all time.
step() {
  local name=$1 limit=$2 left=$((total - SECONDS)) began=$SECONDS
  shift 2
  if ((left < 10)); then
    echo "no time    $name"
    failed+=("$name (no time)")
    return
  fi
  ((limit < left)) || limit=$left
  printf '\n===== %s: %s\n' "$name" "$*" >> "$log"
  if timeout -k 5 "$limit" "$@" >> "$log" 2>&1; then
    echo "ok         $name ($((SECONDS - began)) s)"
  else
    echo "FAILED     $name (status $?, $((SECONDS - began)) s of $limit): the end of its output:"
    tail -n 25 "$log" | cut -c1-200
    failed+=("$name")
  fi
}

# Away from the source tree, so that `import mvp_ext` finds what was installed.
away() { (cd "$out" && "$@"); }
export -f away
tests() { away python -m pytest -q -p no:cacheprovider -c "$root/pyproject.toml" --rootdir="$root" "$@"; }
export -f tests
export out root MVP_REQUIRE_CUDA=1

nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm --format=csv,noheader 2>&1 | tee -a "$log"
step build 200 env MVP_USE_CUDA=ON pip install . --no-build-isolation --no-deps --force-reinstall
away python -m mvp_ext 2>&1 | tee -a "$log"
step "kernels on the GPU" 60 bash -c 'tests -m cuda "$root/tests/test_cuda.py" -k "not compile and not 2_to_the_31"'
step "ops' tests on the GPU" 90 bash -c 'tests -m cuda "$root/tests" --ignore="$root/tests/test_cuda.py"'
step "torch.compile, large tensors" 90 bash -c 'tests -m cuda "$root/tests/test_cuda.py" -k "compile or 2_to_the_31"'

sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2> /dev/null)
if [[ -n $sanitizer ]]; then
  export sanitizer
  for tool in memcheck racecheck; do
    export tool
    step "compute-sanitizer $tool" 60 bash -c 'away "$sanitizer" --tool "$tool" --error-exitcode 9 --kernel-name regex=mvp \
      python -m pytest -q -p no:cacheprovider -c "$root/pyproject.toml" --rootdir="$root" \
      "$root/tests/test_cuda.py" -k "repeats_are_equal"'
  done
else
  echo "left out   compute-sanitizer: not on this machine"
fi

for op in meta_vote residual_add importance pack merge pruned_linear models; do
  case $op in
    pruned_linear) limit=100 seconds=0.12 ;;
    models) limit=80 seconds=0.4 ;;
    *) limit=60 seconds=0.25 ;;
  esac
  # The budget ends a benchmark between two cases, so that what it measured is written.
  step "benchmark $op" "$limit" python "benchmarks/bench_${op}_cuda.py" --seconds "$seconds" --budget $((limit - 25)) \
    --out "$out/$op.json"
done

echo
python benchmarks/cuda_bench.py "$out"
echo "$SECONDS s in all; results in $out"
if ((${#failed[@]})); then
  printf 'not passed: %s\n' "${failed[@]}"
  exit 1
fi
