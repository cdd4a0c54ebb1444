#!/bin/bash
# Installation where there is no internet. Both machines need the same Python version, operating system and processor.
#   bash slurm/offline.sh collect WHEELS [pip options]           where there is internet, in a checkout: fills a folder
#   PYTHON=python3.11 bash slurm/offline.sh install WHEELS VENV  on the cluster: installs from that folder alone
# pip options of `collect` choose another torch build: --extra-index-url URL
# The versions are those of the newest tested stack of constraints/ for this Python, or of STACK=oldest
set -euo pipefail
export DS_BUILD_OPS=0 PIP_DISABLE_PIP_VERSION_CHECK=1
python=${PYTHON:-python3}

case "${1:-}" in
  collect)
    [ $# -ge 2 ] || { echo "offline.sh collect WHEELS [pip options]" >&2; exit 2; }
    constraints=$(dirname "$0")/../constraints
    stack=${STACK:-$("$python" -c 'import sys; sys.path.insert(0, sys.argv[1]); import install; print(install.for_this_python())' "$constraints")}
    # Some packages come as source only: they are built here, so that nothing is built on the cluster.
    "$python" -m pip wheel --wheel-dir "$2" --constraint "$constraints/$stack.txt" "${@:3}" "$(dirname "$0")/.."
    "$python" -c 'import platform; print(platform.python_version())' >"$2/python-version.txt"
    echo "$2: $(find "$2" -name '*.whl' | wc -l) wheels of the stack constraints/$stack.txt; copy the folder and this script to the cluster"
    ;;
  install)
    [ $# -eq 3 ] || { echo "offline.sh install WHEELS VENV" >&2; exit 2; }
    collected=$(cat "$2/python-version.txt") here=$("$python" -c 'import platform; print(platform.python_version())')
    if [ "${collected%.*}" != "${here%.*}" ]; then
      echo "$2 was collected with Python $collected, and $python is $here: name the right one, PYTHON=python${collected%.*}" >&2
      exit 2
    fi
    "$python" -m venv "$3"
    "$3/bin/python" -m pip install --no-index --find-links "$2" esvit-scale
    "$3/bin/esvit-scale" --version
    ;;
  *)
    sed -n '2,6s/^# \{0,1\}//p' "$0" >&2
    exit 2
    ;;
esac
