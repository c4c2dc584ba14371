#!/bin/sh
# The GPU proof: the tests that need a GPU, and the table of benchmarks/gpu/. docs/gpu_proof.md says what its rows mean.
#   sh benchmarks/gpu_proof.sh [FOLDER=build/gpu_proof] [ROW…]
# For one GPU and a Python with torch and transformers, and no network: what else it takes comes from the wheels in .whl/ (sh
# benchmarks/gpu_wheels.sh, before), which are put beside that Python's packages, in FOLDER. DEVICE=cpu: the same way, dry.
# PYTHON names the interpreter. FOLDER keeps table.md, tests.log and lines.jsonl.
set -u
cd "$(dirname "$0")/.." || exit 2
folder=${1:-build/gpu_proof}
[ $# -gt 0 ] && shift
python=${PYTHON:-python3} device=${DEVICE:-cuda} status=0
mkdir -p "$folder"
rm -f "$folder"/table.md "$folder"/tests.log "$folder"/lines.jsonl

if ls .whl/*.whl >/dev/null 2>&1; then
  "$python" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$folder/site" .whl/*.whl || exit 2
  PYTHONPATH=$(cd "$folder/site" && pwd)${PYTHONPATH:+:$PYTHONPATH}
fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 PYTHONWARNINGS=ignore TOKENIZERS_PARALLELISM=false
export CUDA_DEVICE_MAX_CONNECTIONS=1 HF_HUB_OFFLINE=1

[ "$device" = cpu ] || nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
echo "== tests/test_gpu.py, its rows left to the table ($folder/tests.log)"
"$python" -m pytest -q -p no:cacheprovider -k "not row_of" tests/test_gpu.py >"$folder/tests.log" 2>&1 || status=1
tail -n 15 "$folder/tests.log"
echo "== the table ($folder/table.md)"
"$python" -m benchmarks.gpu.table "$@" --device "$device" --lines "$folder/lines.jsonl" 2>"$folder/table.log" >"$folder/table.md" || status=1
cat "$folder/table.md"
[ $status = 0 ] || tail -n 40 "$folder/table.log"
exit $status
