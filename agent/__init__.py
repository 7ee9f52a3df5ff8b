"""The on-device agent: fetches, verifies, serves and reports models.

It must stay light. Nothing in here may import torch, pydantic, FastAPI or SQLAlchemy, nor anything of
`fleet_server` or `converters`; a contract test starts it with only this folder on the path.
"""

__version__ = "0.1.0"
