#!/usr/bin/env bash
# Provide the Mosquitto broker: installed by apt when we are root, unpacked below the virtual environment otherwise.
# Usage: setup-mosquitto.sh VENV
set -euo pipefail
venv=$1
if command -v mosquitto >/dev/null || [ -x /usr/sbin/mosquitto ] || [ -x "$venv/debian/usr/sbin/mosquitto" ]; then
  exit 0
fi
if ! command -v apt-get >/dev/null; then
  echo "Mosquitto 2 is not installed and there is no apt-get: install it by your system's means, then run make again." >&2
  exit 1
fi
if [ "$(id -u)" = 0 ]; then
  echo "Installing Mosquitto …"
  apt-get update -qq
  # RUNLEVEL=1 keeps the package from starting a broker of its own.
  RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends mosquitto >/dev/null
  exit 0
fi
echo "Unpacking Mosquitto below $venv/debian (no root here) …"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$work/lists/partial" "$work/cache/archives/partial" "$work/debs"
apt=(-o "Dir::State::Lists=$work/lists" -o "Dir::Cache=$work/cache" -o "Debug::NoLocking=1")
apt-get "${apt[@]}" update -qq
# Only what this machine lacks is listed by a simulated installation.
packages=$(apt-get "${apt[@]}" install --simulate --no-install-recommends mosquitto | awk '/^Inst /{print $2}')
(cd "$work/debs" && apt-get "${apt[@]}" download -qq $packages)
mkdir -p "$work/root"
for deb in "$work"/debs/*.deb; do dpkg-deb -x "$deb" "$work/root"; done
if [ ! -x "$work/root/usr/sbin/mosquitto" ]; then
  echo "Mosquitto could not be unpacked; ask an administrator for: apt-get install mosquitto" >&2
  exit 1
fi
mkdir -p "$venv"
rm -rf "$venv/debian"
mv "$work/root" "$venv/debian"
