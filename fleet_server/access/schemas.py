"""HTTP shapes of the audit log."""

from __future__ import annotations

import datetime as dt
from typing import Any

from fleet_server.schemas import Response


class AuditEventView(Response):
    """One thing that was done."""

    id: str
    at: dt.datetime
    actor: str
    action: str
    subject: str
    detail: dict[str, Any]
