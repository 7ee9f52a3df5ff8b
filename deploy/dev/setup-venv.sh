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
pip=("$venv/bin/pip" --quiet --disable-pip-version-check)
# What is installed is what was locked, to the byte; without its dependencies, for the lock names them all.
"${pip[@]}" install --progress-bar on --require-hashes --no-deps --requirement deploy/locks/dev.lock
# torch alone has no hash: an unpinned one may bring gigabytes of CUDA, and its wheel for CPUs has another hash than the
# one for GPUs. Where pip is configured with the CPU wheel (PIP_FIND_LINKS or PIP_EXTRA_INDEX_URL), it is taken from there.
"${pip[@]}" install --progress-bar on --no-deps "$(grep '^torch==' constraints.txt)"
"${pip[@]}" install --no-deps --no-build-isolation --editable .
"$venv/bin/pip" check >/dev/null || { "$venv/bin/pip" check >&2; exit 1; }
