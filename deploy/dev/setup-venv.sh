#!/usr/bin/env bash
# Make the development environment. Usage: setup-venv.sh PYTHON VENV
set -euo pipefail
python=$1 venv=$2
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
  echo "Shoal needs Python 3.11 or newer; $python is $("$python" --version). Set PYTHON=… to another one." >&2
  exit 1
fi
if [ ! -x "$venv/bin/python" ]; then
  if ! "$python" -m venv "$venv"; then
    echo "The module venv is missing: apt-get install python3-venv, then run make again." >&2
    rm -rf "$venv"
    exit 1
  fi
fi
echo "Installing Shoal and its tools into $venv (about 2 GB; a few minutes the first time) …"
"$venv/bin/pip" install --quiet --disable-pip-version-check --upgrade 'pip>=25'
# constraints.txt pins torch: an unpinned one may bring gigabytes of CUDA. Where pip is configured with the CPU wheel
# (PIP_FIND_LINKS or PIP_EXTRA_INDEX_URL), it is taken from there.
"$venv/bin/pip" install --quiet --disable-pip-version-check --progress-bar on \
  --constraint constraints.txt --editable '.[dev]'
