"""A server that can't start says in one sentence why, and leaves nothing running."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.fleet import BIN, free_port


@pytest.mark.parametrize(
    ("variables", "status", "said"),
    [
        ({"SHOAL_MOSQUITTO": "no-such-broker"}, 1, "no-such-broker"),
        ({"SHOAL_STATE_DIR": "/proc/nowhere"}, 1, "SHOAL_STATE_DIR"),
        ({"SHOAL_DATABASE_URL": "postgresql+psycopg://x@127.0.0.1:1/x"}, 1, "SHOAL_DATABASE_URL"),
        ({"SHOAL_HOST": "0.0.0.0"}, 2, "SHOAL_ADMIN_TOKEN"),
        ({"SHOAL_BROKER_HOST": "0.0.0.0"}, 2, "SHOAL_BROKER_TLS"),
        ({"SHOAL_BROKER_TLS": "true", "SHOAL_BROKER_URL": "mqtt://broker"}, 2, "mqtts://"),
        ({"SHOAL_TLS_CERT": "/nowhere.pem", "SHOAL_TLS": "true"}, 2, "SHOAL_TLS_KEY"),
        ({"SHOAL_PORT": "many"}, 2, "SHOAL_PORT"),
        ({"SHOAL_LOG_LEVEL": "LOUD"}, 2, "SHOAL_LOG_LEVEL"),
        ({"SHOAL_BROKER_URL": "http://broker"}, 2, "SHOAL_BROKER_URL"),
        ({"SHOAL_BROKER_URL": "mqtt://broker:many"}, 2, "SHOAL_BROKER_URL"),
        ({"SHOAL_DATABASE_URL": "not a database"}, 2, "SHOAL_DATABASE_URL"),
        ({"SHOAL_ARTIFACTS_URL": "ftp://nowhere"}, 2, "SHOAL_ARTIFACTS_URL"),
        ({"SHOAL_ONNX2TF_PYTHON": "/nowhere/python"}, 2, "setup-onnx2tf"),
    ],
)
def test_one_sentence(tmp_path: Path, variables: dict[str, str], status: int, said: str) -> None:
    environment = {
        **os.environ,
        "SHOAL_STATE_DIR": str(tmp_path),
        "SHOAL_PORT": str(free_port()),
        "SHOAL_BROKER_PORT": str(free_port()),
        **variables,
    }
    done = subprocess.run(
        [str(BIN / "shoal-server")], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == status, done.stderr
    assert said in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
