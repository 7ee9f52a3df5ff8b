"""The on-device agent: fetches, verifies, serves and reports models.

It must stay light. Nothing in here may import torch, pydantic, FastAPI or SQLAlchemy, nor anything of
`fleet_server` or `converters`; a contract test starts it with only this folder on the path.
"""

import os

# ONNX Runtime would keep an id of the machine and send events to its maker. It reads this when it is loaded; every
# process of Shoal that loads it imports this package first, and its children inherit it.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

__version__ = "0.1.0"
