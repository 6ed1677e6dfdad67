#!/usr/bin/env bash
# Everything that needs a GPU, in one command and without network: build, tests, sanitizers, benchmarks, summary.
#   scripts/gpu_check.sh [OUT]     results and log under OUT (default runs/gpu_check); under 9 minutes on one H200
# Needs python3 (or PYTHON) with torch for CUDA and the package's requirements, pybind11, cmake, ninja, pytest, and nvcc.
# A step that fails or runs out of time does not stop the next ones; each leaves its result, so a run that is cut off is
# worth reading. Exit status: 0 if all steps passed.
#   MVP_GPU_SECONDS=525     the time for all of it
#   MVP_GPU_PARTS="build tests sanitizers benchmarks"     some of it, where the rest has been done
#   MVP_CUDA_ARCHS          built for; default: the GPU that is here
#   MVP_COMMIT              for the results' files, where the sources are a copy without git
set -uo pipefail
cd "$(dirname "$0")/.."
root=$PWD
out=${1:-runs/gpu_check}
mkdir -p "$out"
out=$(cd "$out" && pwd)
log=$out/log.txt
: > "$log"
total=${MVP_GPU_SECONDS:-525}
parts=${MVP_GPU_PARTS:-build tests sanitizers benchmarks}
python=$(command -v "${PYTHON:-python3}") || { echo "no ${PYTHON:-python3} on the PATH"; exit 1; }
# Where cmake and ninja of that Python are, and nvcc and compute-sanitizer of a usual installation.
PATH=$("$python" -c 'import os, sys; print(os.path.dirname(sys.executable))'):$PATH:/usr/local/cuda/bin
failed=()
SECONDS=0
has_part() { [[ " $parts " == *" $1 "* ]]; }
# When the running part must end: some of the time is the benchmarks', whatever goes wrong before them.
end=$total
! has_part benchmarks || end=$((total * 3 / 5))

# step NAME LIMIT COMMAND…: at most LIMIT seconds, and never past the end. Its status is the command's.
step() {
  local name=$1 limit=$2 left=$((end - SECONDS)) began=$SECONDS status=0
  shift 2
  if ((left < 10)); then
    echo "no time    $name"
    failed+=("$name (no time)")
    return 1
  fi
  ((limit < left)) || limit=$left
  printf '\n===== %s: %s\n' "$name" "$*" >> "$log"
  timeout -k 5 "$limit" "$@" >> "$log" 2>&1 || status=$?
  if ((status == 0)); then
    echo "ok         $name ($((SECONDS - began)) s)"
  else
    echo "FAILED     $name (status $status, $((SECONDS - began)) s of $limit): the end of its output:"
    tail -n 25 "$log" | cut -c1-200
    failed+=("$name")
  fi
  return "$status"
}

# Away from the source tree, so that `import mvp_ext` finds what was installed.
away() { (cd "$out" && "$@"); }
tests() {
  away ${checker:-} "$python" -m pytest -q -p no:cacheprovider --continue-on-collection-errors -m cuda \
    -c "$root/pyproject.toml" --rootdir="$root" "$@"
}
export -f away tests
export out root python PATH PYTHONUNBUFFERED=1 MVP_REQUIRE_CUDA=1

nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm --format=csv,noheader 2>&1 | tee -a "$log"
if has_part build; then
  # CI builds for all architectures; here that would take the time of a few benchmarks.
  here=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2> /dev/null | head -n 1 | tr -d '. ')
  [[ -n ${MVP_CUDA_ARCHS:-} || ! $here =~ ^[0-9]+$ ]] || export MVP_CUDA_ARCHS=$here-real
  rm -rf build/lib*  # a module that was deleted here would still be installed
  step build 200 env MVP_USE_CUDA=ON "$python" -m pip install . --no-index --no-build-isolation --no-deps \
    --force-reinstall --disable-pip-version-check
fi
away timeout 30 "$python" -m mvp_ext 2>&1 | tee -a "$log"

if has_part tests; then
  # Each in a process of its own: a kernel that faults ends its process's use of the GPU.
  workers=$("$python" -c 'import xdist' 2> /dev/null && echo "-n 4")
  export workers
  step "kernels on the GPU" 60 bash -c 'tests "$root/tests/ops/test_cuda.py" -k "not compile and not 2_to_the_31 and not main_job"'
  MVP_HOPPER=0 step "pruned_linear on the GPU" 60 bash -c 'tests "$root/tests/ops/test_pruned_linear_cuda.py"'
  if ! step "pruned_linear by wgmma" 60 bash -c 'tests "$root/tests/ops/test_pruned_linear_cuda.py" -k "equals or edges or not_read or repeats or views or hopper or gelu"'; then
    export MVP_HOPPER=0
    echo "           the steps that follow leave the wgmma kernel out"
  fi
  step "the other ops on the GPU" 75 bash -c 'tests $workers "$root/tests" --ignore="$root/tests/ops/test_cuda.py" \
    --ignore="$root/tests/ops/test_pruned_linear_cuda.py"'
  step "the main job on the GPU" 45 bash -c 'tests "$root/tests/ops/test_cuda.py" -k main_job'
  step "torch.compile, large tensors" 60 bash -c 'tests "$root/tests/ops/test_cuda.py" -k "compile or 2_to_the_31"'
fi

if has_part sanitizers; then
  if command -v compute-sanitizer > /dev/null; then
    for tool in memcheck racecheck; do
      # torch asks the driver for functions that it may lack, which is no error of ours. The library's kernels are not
      # looked at, but take long to load.
      export checker="compute-sanitizer --tool $tool --error-exitcode 9 --report-api-errors no --kernel-name regex=mvp"
      step "compute-sanitizer $tool" 50 bash -c 'tests "$root/tests/ops/test_cuda.py" -k "repeats_are_equal and not library"'
    done
    unset checker
  else
    echo "left out   compute-sanitizer: not on this machine"
  fi
fi

end=$total
if has_part benchmarks; then
  # The time that is left, by shares; what one does not use is the next ones'. First what most depends on.
  ops=(pruned_linear meta_vote importance pack residual_add merge models pruned_attention pruned_conv2d)
  shares=(6 3 3 2 2 2 4 1 1)
  rest=0
  for share in "${shares[@]}"; do ((rest += share)); done
  for i in "${!ops[@]}"; do
    op=${ops[i]} left=$((total - SECONDS))
    limit=$((left * shares[i] / rest))
    ((limit > 25)) || limit=25
    ((limit < left)) || limit=$left
    ((rest -= shares[i]))
    case $op in
      pruned_linear) seconds=0.1 ;;
      models) seconds=0.4 ;;
      *) seconds=0.2 ;;
    esac
    # The budget ends a benchmark between two cases; its file is written after each.
    step "benchmark $op" "$limit" "$python" "benchmarks/bench_$op.py" --device cuda --seconds "$seconds" \
      --budget $((limit * 2 / 3)) --out "$out/$op.json"
  done
fi

echo
timeout -k 5 30 "$python" benchmarks/results.py "$out"
echo "$SECONDS s in all; results in $out"
if ((${#failed[@]})); then
  printf 'not passed: %s\n' "${failed[@]}"
  exit 1
fi
