#!/usr/bin/env bash
# Runs the TUF conformance suite (github.com/theupdateframework/tuf-conformance) against tests/conformance/tuf-client.
# The suite pins its own versions of python-tuf and pytest, so it gets an environment beside Shoal's.
set -euo pipefail
python=$1 venv=$2
suite=${TUF_CONFORMANCE:-}
if [[ ! -f "$suite/tuf_conformance/conftest.py" ]]; then
    echo "the suite is not here: git clone https://github.com/theupdateframework/tuf-conformance, then" >&2
    echo "make test-tuf-conformance TUF_CONFORMANCE=/path/of/that/checkout" >&2
    exit 2
fi
if ! command -v faketime >/dev/null; then
    echo "faketime is not here, and the tests of expiry need it: apt install faketime" >&2
    exit 2
fi
[[ -x .venv-tuf/bin/pytest ]] || { "$python" -m venv .venv-tuf && .venv-tuf/bin/pip install --quiet "$suite"; }
SHOAL_PYTHON="$PWD/$venv/bin/python" .venv-tuf/bin/pytest -c "$suite/pyproject.toml" "$suite/tuf_conformance" \
    --entrypoint "$PWD/tests/conformance/tuf-client"
