#!/usr/bin/env bash
# Make the environment in which ONNX becomes LiteRT on a server. Usage: setup-onnx2tf.sh PYTHON VENV
# It is apart from Shoal's own: onnx2tf needs TensorFlow and an older numpy and onnx.
set -euo pipefail
python=$1 venv=$2
here=$(dirname "$0")
if [ "$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')" != 3.11 ]; then
  echo "This environment is pinned for Python 3.11; $python is $("$python" --version). Set PYTHON=… to another one." >&2
  exit 1
fi
# Made afresh: what an older list of packages left behind must not lie beside this one's.
if ! "$python" -m venv --clear "$venv"; then
  echo "The module venv is missing: apt-get install python3-venv, then run make again." >&2
  rm -rf "$venv"
  exit 1
fi
echo "Installing onnx2tf and TensorFlow into $venv (2 GB; about a minute) …"
"$venv/bin/pip" install --quiet --disable-pip-version-check --no-deps --requirement "$here/constraints-onnx2tf.txt"
if ! said=$("$venv/bin/python" -c 'import onnx2tf' 2>&1); then
  echo "onnx2tf does not start in $venv:" >&2
  tail -n 5 <<< "$said" >&2
  echo "Remove $venv and run make setup-onnx2tf again." >&2
  exit 1
fi
