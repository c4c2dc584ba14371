#!/bin/sh
# Prints the path of a Python 3.11 that can make virtual environments: requirements/cpu.txt pins packages for no other.
#   find_python.sh [INTERPRETER]     an interpreter given by name or path is the only one looked at
# Looked for on PATH and among those of pyenv and uv; where there is none, uv is asked to fetch one. If that fails too: a
# line that says what to do, and exit code 1.
set -u
VERSION=3.11

# Prints the real path of interpreter $1 (which may be a shim) if it will do.
usable() {
  "$1" -c "
import ensurepip, sys, venv
if '%d.%d' % sys.version_info[:2] == '$VERSION':
    print(sys.executable)" 2>/dev/null | grep .
}

first_usable() {
  while IFS= read -r candidate; do
    usable "$candidate" </dev/null && return
  done
  return 1
}

# Every program of such a name, not PATH's first alone: that may be a shim that refuses.
on_path() {
  echo "$PATH" | tr : '\n' | while IFS= read -r folder; do
    for name in "python$VERSION" python3 python; do
      [ -x "$folder/$name" ] && echo "$folder/$name"
    done
  done
}

installed() {
  ls -d "${PYENV_ROOT:-$HOME/.pyenv}/versions/$VERSION".*/bin/python \
    "${UV_PYTHON_INSTALL_DIR:-${XDG_DATA_HOME:-$HOME/.local/share}/uv/python}/cpython-$VERSION".*/bin/python 2>/dev/null
}

# uv may be on PATH; any Python that makes virtual environments can install it, into build/ and not into itself.
uv_program() {
  command -v uv && return
  [ -x build/uv/bin/uv ] || { python3 -m venv build/uv && build/uv/bin/python -m pip install --quiet --retries 1 uv; } >&2
  echo build/uv/bin/uv
}

fetched() {
  echo "== setup: no Python $VERSION here; trying to fetch one with \`uv python install $VERSION\`" >&2
  tool=$(uv_program) && "$tool" python install "$VERSION" >&2 && "$tool" python find --managed-python "$VERSION"
}

if [ -n "${1:-}" ]; then
  usable "$1" && exit
  echo "PYTHON=$1 is no Python $VERSION with venv and ensurepip: name another, or leave PYTHON out to have one looked for" >&2
  exit 1
fi
{ on_path; installed; } | first_usable && exit
fetched | first_usable && exit
echo "no Python $VERSION found or fetched: install one (apt install python$VERSION-venv, pyenv install $VERSION, conda create -n py python=$VERSION)" \
  "and, if it is not on PATH, say where: make PYTHON=<its path>" >&2
exit 1
