#!/usr/bin/env bash
# One node's vLLM servers: srun starts this once on each serving node. The agent ends with 0 when the run has ended and with
# 2 when it is refused for good; after anything else, such as a network that was away, it tries to join again.
set -uo pipefail
mkdir -p "$RUN_DIR/servers/$SLURMD_NODENAME"
exec >> "$RUN_DIR/servers/$SLURMD_NODENAME/agent.log" 2>&1
trap "" TERM # it asks the trainer to save, which still needs its servers for that
while true; do
    "$PYTHON" -m nemo_dapo.rollout.agent --run-file "$RUN_DIR/rollout.json"
    status=$?
    ((status != 0 && status != 2)) || exit "$status"
    sleep 5
done
