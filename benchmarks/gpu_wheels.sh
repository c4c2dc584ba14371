#!/bin/sh
# Fetches the wheels that requirements/gpu_proof.txt names into FOLDER, for Python 3.12 on x86-64 Linux, whatever runs this:
#   sh benchmarks/gpu_wheels.sh [FOLDER=.whl] [PYTHON=python3]      with a package index; PYTHON has pip
set -eu
folder=${1:-.whl} python=${2:-python3}
named=$(dirname "$0")/../requirements/gpu_proof.txt
mkdir -p "$folder"
rm -f "$folder"/*.whl # two versions of one package stop the installation

"$python" -m pip wheel --quiet --no-deps --wheel-dir "$folder" "$(grep '^antlr4' "$named")" # on the index as source alone
platforms=""
for glibc in 2_28 2_27 2_24 2_17; do
  platforms="$platforms --platform manylinux_${glibc}_x86_64"
done
grep '^[a-z]' "$named" | grep -v '^antlr4' | while read -r requirement; do
  # shellcheck disable=SC2086 # $platforms are several words
  "$python" -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp $platforms \
    --dest "$folder" "$requirement"
done
du -sh "$folder"
