#!/usr/bin/env bash
# Provide SoftHSM, on which keys in PKCS #11 tokens are tested: by apt when we are root. Elsewhere those tests are skipped.
set -euo pipefail
if command -v softhsm2-util >/dev/null || [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
  exit 0
fi
echo "Installing SoftHSM …"
apt-get update -qq
DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends softhsm2 >/dev/null ||
  echo "SoftHSM could not be installed: tests of keys in tokens are skipped" >&2
