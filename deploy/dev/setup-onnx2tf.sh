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
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
echo "Installing onnx2tf and TensorFlow into $venv (2.6 GB; about a minute) …"
"$venv/bin/pip" install --quiet --disable-pip-version-check --no-deps --requirement "$here/constraints-onnx2tf.txt"
"$venv/bin/python" -c 'import onnx2tf' > /dev/null 2>&1
