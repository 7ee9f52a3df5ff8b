#!/usr/bin/env bash
# Write deploy/locks: every package with the SHA-256 of each of its files, in the versions of constraints.txt.
# Usage: lock.sh TOOLS_VENV
#
# torch is not in them: its wheel for CPUs comes from another index than the one for GPUs, with another hash.
set -euo pipefail
uv=$1/bin/uv
pins=$(mktemp)
trap 'rm -f "$pins"' EXIT
grep -v '^torch==' constraints.txt >"$pins"
lock() {
  "$uv" pip compile --quiet --generate-hashes --universal --python-version 3.11 --no-header --no-annotate "$@"
}
lock --no-deps "$pins" --output-file deploy/locks/dev.lock
lock pyproject.toml --extra cpu --constraints "$pins" --output-file deploy/locks/agent.lock
lock pyproject.toml --extra server --constraints "$pins" --output-file deploy/locks/server.lock
lock pyproject.toml --extra server --extra convert-onnx --constraints "$pins" --output-file deploy/locks/server-convert.lock
