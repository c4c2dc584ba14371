#!/bin/sh
# Makes the environment FOLDER: Python 3.11, the pinned packages of requirements/cpu.txt, and this checkout, editable.
#   setup.sh FOLDER [INTERPRETER]
# The CPU build of torch comes from the folder PIP_FIND_LINKS, or from the index TORCH_INDEX (a mirror, say), or else from
# PyTorch's own CPU index; everything else from the package index that pip and uv are configured for.
set -eu
folder=$1 interpreter=${2:-}
python=$folder/bin/python
here=$(dirname "$0")

echo "== setup: Python environment in $folder (about 1 minute, once)"
if [ -x "$python" ]; then
  sh "$here/find_python.sh" "$python" >/dev/null 2>&1 || { echo "$folder is of another Python: rm -r $folder" >&2; exit 1; }
else
  base=$(sh "$here/find_python.sh" "$interpreter")
  echo "== setup: from $base"
  "$base" -m venv "$folder"
fi
"$python" -m pip install --quiet --disable-pip-version-check uv

# uv reads neither pip's variables nor pip's configuration.
if [ -n "${PIP_FIND_LINKS:-}" ]; then
  torch="of $PIP_FIND_LINKS (PIP_FIND_LINKS)"
  set -- --find-links "$PIP_FIND_LINKS"
elif [ -n "${TORCH_INDEX:-}" ]; then
  torch="of $TORCH_INDEX (TORCH_INDEX)"
  set -- --extra-index-url "$TORCH_INDEX" --index-strategy unsafe-best-match
else
  torch="of PyTorch's index, https://download.pytorch.org/whl/cpu"
  set -- --torch-backend cpu
fi
echo "== setup: installing $(grep -c == "$here/cpu.txt") packages, the CPU build of torch $torch"
"$folder/bin/uv" pip install --python "$python" --requirements "$here/cpu.txt" --overrides "$here/overrides.txt" "$@" || {
  echo "setup: the packages could not be installed; without access to that place, set PIP_FIND_LINKS to a folder with a CPU" \
    "build of torch, or TORCH_INDEX to a mirror of PyTorch's CPU index" >&2
  exit 1
}
"$folder/bin/uv" pip install --python "$python" --no-deps --editable .
