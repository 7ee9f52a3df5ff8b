#!/usr/bin/env bash
# The environment of the tools that lock, audit and list what Shoal is made of. Usage: setup-tools.sh PYTHON VENV
set -euo pipefail
python=$1 venv=$2
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
"$venv/bin/pip" install --quiet --disable-pip-version-check --constraint deploy/dev/constraints-tools.txt \
  uv pip-audit cyclonedx-bom
