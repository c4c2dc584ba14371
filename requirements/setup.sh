#!/bin/sh
# Makes the environment FOLDER: Python 3.11, the pinned packages of requirements/cpu.txt, and this checkout, editable.
#   setup.sh FOLDER [INTERPRETER]
# The CPU build of torch comes from where torch_source.sh says; everything else from the package index that uv is configured for.
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

. "$here/torch_source.sh"
echo "== setup: installing $(grep -c == "$here/cpu.txt") packages, the CPU build of torch $torch"
"$folder/bin/uv" pip install --python "$python" --requirements "$here/cpu.txt" --overrides "$here/overrides.txt" || {
  echo "setup: the packages could not be installed; without access to that place, set PIP_FIND_LINKS to a folder with a CPU" \
    "build of torch, or TORCH_INDEX to a mirror of PyTorch's CPU index" >&2
  exit 1
}
"$folder/bin/uv" pip install --python "$python" --no-deps --editable .
