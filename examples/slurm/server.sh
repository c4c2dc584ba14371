#!/usr/bin/env bash
# One node's vLLM servers: srun starts this once on each serving node. It ends with 0 when the run has ended, and with 2 when
# the run refuses the node for good; a network that was away, and a job that starts again, are waited for.
set -uo pipefail
mkdir -p "$RUN_DIR/servers/$SLURMD_NODENAME"
trap "" TERM # it asks the trainer to save, which still needs its servers for that
exec "$PYTHON" -m nemo_dapo.rollout.keeper --run-file "$RUN_DIR/rollout.json" \
    >> "$RUN_DIR/servers/$SLURMD_NODENAME/agent.log" 2>&1
