#!/usr/bin/env bash
# The environments of the servers that bench-serving measures beside Shoal's. Usage: setup-serving-peers.sh PYTHON FOLDER
# PyTriton carries an interpreter of its own that fails with the standard library of 3.11.6 and later: Debian's is older.
set -euo pipefail
python=$1 folder=$2
while read -r name interpreter package; do
  echo "$name: $package"
  [ -x "$folder/$name/bin/python" ] || "$interpreter" -m venv "$folder/$name"
  "$folder/$name/bin/pip" install --quiet --disable-pip-version-check "$package" onnxruntime==1.31.0
done <<PEERS
litserve $python litserve==0.2.19
mlserver $python mlserver==1.7.1
bentoml $python bentoml==1.4.40
rayserve $python ray[serve]==2.60.0
pytriton $([ -x /usr/bin/python3 ] && echo /usr/bin/python3 || echo "$python") nvidia-pytriton==0.7.0
PEERS
