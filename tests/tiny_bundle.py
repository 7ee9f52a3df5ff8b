"""A bundle of a release of the agent that holds no agent: servers look no further."""

from __future__ import annotations

import io
import tarfile

import msgspec

from agent.protocol.release import INFO, ReleaseInfo, own_platform


def tiny_bundle(version: str, **fields: str) -> bytes:
    """The bytes of one."""
    info = ReleaseInfo(**{"version": version, "platform": own_platform(), **fields}, unpacked=1)  # type: ignore[arg-type]
    content, file = msgspec.json.encode(info), io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        member = tarfile.TarInfo(INFO)
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
    return file.getvalue()
