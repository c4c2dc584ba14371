#!/usr/bin/env bash
# The demo: warm start (cached), DAPO on $RANKS ranks with a real vLLM server, report. Run it through `make demo`.
set -euo pipefail
cd "$(dirname "$0")/../.."
EXPERIMENT=${EXPERIMENT:-demo} SEED=${SEED:-0} PARALLEL=${PARALLEL:-} RANKS=${RANKS:-2}
RUN=${RUN:-runs/$EXPERIMENT}
# Threads that wait must sleep: spinning ones starve the other processes on a small machine.
export OMP_WAIT_POLICY=PASSIVE
started=${STARTED:-$(date +%s)}

if [[ -f $RUN/summary.json ]]; then
  echo "== demo: $RUN/summary.json is there; remove $RUN to run it again"
  cat "$RUN/summary.json"
  exit 0
fi
echo "== demo 1/3: a small model, warm-started on imperfect worked solutions ($RUN/model)"
python examples/demo/prepare.py --output "$RUN/model" --experiment "$EXPERIMENT" --seed "$SEED"
echo "== demo 2/3: DAPO on $RANKS ranks (${PARALLEL:+parallel=$PARALLEL, }experiment=$EXPERIMENT) with a vLLM server; logs and metrics in $RUN"
torchrun --standalone --nproc-per-node "$RANKS" \
  examples/train_dapo.py experiment="$EXPERIMENT" ${PARALLEL:+"parallel=$PARALLEL"} model.path="$RUN/model" \
  output_dir="$RUN" seed="$SEED"
echo "== demo 3/3: report"
python examples/demo/report.py --run "$RUN" --started "$started"
