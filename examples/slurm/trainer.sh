#!/usr/bin/env bash
# One node's trainer ranks: srun starts this once on each node, with the options of examples/train_dapo.py.
set -uo pipefail
if [[ -n ${INTERFACE:-} ]]; then
    export GLOO_SOCKET_IFNAME=$INTERFACE NCCL_SOCKET_IFNAME=$INTERFACE
fi

# Slurm asks by SIGTERM, at a preemption twice, and in some clusters it asks each process. torchrun would leave its ranks
# at the second one: it hears none of them, and the ranks get a SIGUSR1, after which they save and end by themselves.
export PET_SIGNALS_TO_HANDLE=SIGINT
export TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE="\${rank}: "
(
    trap "" TERM
    exec "$PYTHON" -m torch.distributed.run \
        --nnodes "$SLURM_STEP_NUM_NODES" --node-rank "$SLURM_PROCID" \
        --nproc-per-node "${RANKS_PER_NODE:-$SLURM_GPUS_ON_NODE}" \
        --master-addr "$HEAD_NODE" --master-port "$PORT" --rdzv-id "$SLURM_JOB_ID" \
        --log-dir "$RUN_DIR/logs/$SLURMD_NODENAME" --tee 3 \
        "${SCRIPT:-examples/train_dapo.py}" name="$SLURM_JOB_NAME" output_dir="$RUN_DIR" checkpoint.on_signal=true "$@"
) &
launcher=$!
# shellcheck disable=SC2329  # the trap calls it
ask_to_save() {
    trap "" TERM
    asked=yes
    touch "$RUN_DIR/.asked_to_stop"
    read -ra ranks < "/proc/$launcher/task/$launcher/children"
    ((${#ranks[@]} == 0)) || kill -USR1 "${ranks[@]}"
}
trap ask_to_save TERM
while kill -0 "$launcher" 2> /dev/null; do
    wait "$launcher"
    status=$?
done
# srun ends the other nodes' ranks by the same signal: only where none had failed before was the job asked to stop.
[[ $status == 0 || -n ${asked:-} ]] || echo "$SLURMD_NODENAME" >> "$RUN_DIR/.failed"
exit "$status"
