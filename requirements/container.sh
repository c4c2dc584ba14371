#!/bin/sh
# What the Dockerfile adds to NVIDIA's NeMo container, one step a call; each also runs by hand, beside any other environment:
#   container.sh vllm FOLDER [OPTION…]   vLLM, in an environment of its own (rollout.python=FOLDER/bin/python)
#   container.sh trainer PYTHON          what ngc.txt lists, for the trainer's interpreter
#   container.sh package PYTHON…         this checkout, editable, for each interpreter
#   container.sh check PYTHON MODULE…    that PYTHON can import each MODULE: a missing piece fails the build, not the job
# By uv, which the container holds: its pip belongs to another interpreter than its python3, and obeys PIP_CONSTRAINT, by which
# NVIDIA pins packages for the container's torch, while vLLM brings a torch of its own. VLLM names another version of vLLM.
set -eu
export UV_PYTHON_DOWNLOADS=never
unset UV_CONSTRAINT UV_OVERRIDE UV_SYSTEM_PYTHON
step=$1
target=$2
root=$(dirname "$0")/..

case $step in
vllm)
  shift 2
  uv venv "$target"
  uv pip install --python "$target/bin/python" "${VLLM:-vllm==0.32.0}" "$@"
  ;;
trainer) # without dependencies: a resolver would exchange the container's torch for another one
  uv pip install --python "$target" --no-deps --requirements "$root/requirements/ngc.txt"
  ;;
package)
  shift
  for python; do
    uv pip install --python "$python" --no-deps --editable "$root"
  done
  ;;
check)
  shift 2
  for module; do
    "$target" -c "import $module" || { echo "container.sh: $target cannot import $module" >&2; exit 1; }
  done
  ;;
*)
  echo "container.sh: no step $step; expected vllm, trainer, package or check" >&2
  exit 2
  ;;
esac
