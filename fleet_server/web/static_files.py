"""Static files, of which some lie here packed: browsers unpack them, and the server is smaller by what they shrank."""

from __future__ import annotations

import asyncio
import gzip
import re
from pathlib import Path

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import FileResponse, Response
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

_DIFFERS = {"Vary": "Accept-Encoding"}
_REFUSED = re.compile(r"gzip\s*;\s*q=0(\.0*)?\s*(,|$)")


class PackedFiles(StaticFiles):
    """As Starlette's; where a file is not there, but is with `.gz` behind its name, that one is sent under its name."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        """The answer to one request.

        Raises:
            HTTPException: 404 and 405, as Starlette's.
        """
        try:
            return await super().get_response(path, scope)
        except HTTPException as error:
            if error.status_code != 404:
                raise
        found = await super().get_response(f"{path}.gz", scope)
        found.headers.update(_DIFFERS)
        if not isinstance(found, FileResponse):
            return found  # the browser has it already
        accepted = Headers(scope=scope).get("accept-encoding", "")
        if "gzip" in accepted and not _REFUSED.search(accepted):
            found.headers["Content-Encoding"] = "gzip"
            return found
        plain = await asyncio.to_thread(_unpacked, Path(found.path))
        return Response(plain, headers=_DIFFERS, media_type=found.media_type)


def _unpacked(path: Path) -> bytes:
    return gzip.decompress(path.read_bytes())
