#!/usr/bin/env bash
# On each node, before anything starts: one line for each thing that is missing, with the node's name.
set -uo pipefail
node=${SLURMD_NODENAME:-$(hostname)}
missing=0
miss() {
    echo "node $node: $*" >&2
    missing=1
}

if [[ $(cat "$RUN_DIR/.node_check" 2> /dev/null) != "$SLURM_JOB_ID" ]]; then
    miss "does not see $PWD/$RUN_DIR/.node_check, which node $HEAD_NODE has written: put the folder on a disk that all share"
elif ! touch "$RUN_DIR/.node_check_$node" 2> /dev/null; then
    miss "cannot write to $PWD/$RUN_DIR: is the disk full, read-only, or another user's?"
fi
rm -f "$RUN_DIR/.node_check_$node"

for module in torch megatron.core megatron.bridge nemo_dapo; do
    find="import importlib.util, sys; sys.exit(importlib.util.find_spec('$module') is None)"
    "$PYTHON" -c "$find" 2> /dev/null || miss "$PYTHON does not find $module: is the environment on a disk of all nodes?"
done
if [[ -n ${VLLM_PYTHON:-} && ! -x $VLLM_PYTHON ]]; then
    miss "VLLM_PYTHON=$VLLM_PYTHON is no program here"
fi

needed=${SHM_GIB:-1} # of host memory, for twice the model's weights in its precision: 2 x 61 for a 32 B model in bf16
free=$(($(stat --file-system --format '%a * %S' /dev/shm) / 2**30))
((free >= needed)) || miss "has $free GiB free in /dev/shm, needs SHM_GIB=$needed: remove what ended jobs left there"

if command -v nvidia-smi > /dev/null; then
    gpus=$(nvidia-smi --list-gpus | wc -l)
    ((gpus >= ${SLURM_GPUS_ON_NODE:-0})) || miss "has $gpus working GPUs, should have $SLURM_GPUS_ON_NODE"
fi
if [[ -n ${INTERFACE:-} && ! -e /sys/class/net/$INTERFACE ]]; then
    miss "has no network interface INTERFACE=$INTERFACE, only $(basename -a /sys/class/net/* | paste -sd ' ')"
fi
exit $missing
