"""Looks at the images and the chart with their own tools: run by `make lint-deploy`, in an environment that has them.

hadolint reads the Dockerfiles; Helm renders the chart, with the values that it comes with and with each choice turned
the other way, and what comes out is checked against Kubernetes' schemas.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import helm_python
import kubernetes_validate
import yaml

DEPLOY = Path(__file__).resolve().parents[1]
KUBERNETES = "1.30"
CHOICES: dict[str, dict[str, Any]] = {
    "as it comes": {},
    "one replica, one broker": {
        "server": {"replicas": 1, "keys": {"accessMode": "ReadWriteOnce"}},
        "nats": {"replicas": 1},
    },
    "a database and a role from elsewhere": {"postgresql": {"enabled": False}, "artifacts": {"secret": ""}},
    "storage by name": {
        "server": {"keys": {"storageClass": "nfs"}},
        "nats": {"storageClass": "fast"},
        "postgresql": {"storageClass": "fast"},
    },
    "keys that are there": {"server": {"keys": {"existingClaim": "keys"}}},
}


def main() -> None:
    """End with 1 where something is wrong."""
    images = [str(path) for path in sorted((DEPLOY / "images").glob("*.Dockerfile"))]
    failed = subprocess.run([str(Path(sys.executable).parent / "hadolint"), *images], check=False).returncode != 0
    print(f"{len(images)} Dockerfiles")
    for name, values in CHOICES.items():
        with helm_python.Chart.load(str(DEPLOY / "helm" / "shoal")) as chart:
            files = chart.render(values, name="fleet", namespace="default")
        resources = [one for text in files.values() for one in yaml.safe_load_all(text) if one]
        for resource in resources:
            try:
                kubernetes_validate.validate(resource, KUBERNETES, strict=True)
            except kubernetes_validate.ValidationError as error:
                failed = True
                print(f"{name}: {resource['kind']} {resource['metadata']['name']}: {error}")
        print(f"chart, {name}: {', '.join(sorted(one['kind'] for one in resources))}")
    sys.exit(failed)


if __name__ == "__main__":
    main()
