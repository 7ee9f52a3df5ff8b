"""What a backup is: a folder of its own beside others, and artifacts that all of them share.

OUT/artifacts/ab/abcd…          bytes by their SHA-256; `samples/ab/…` those that devices sent
OUT/20261129T104800Z/           one backup
    database.sqlite             every row, at one moment, whatever database it came from
    secrets/…                   CA, signing keys, the admin's token
    backup.json                 what it is; written last: without it there is no backup
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from fleet_server.errors import InvalidError

FORMAT = 1
INDEX = "backup.json"
DATABASE = "database.sqlite"
SECRETS = "secrets"
ARTIFACTS = "artifacts"
CA_FILES = ("ca.pem", "ca.key")


class Index(msgspec.Struct, frozen=True):
    """`backup.json`.

    Attributes:
        format: of the backup.
        made_at: when its rows were as they are, RFC 3339.
        version: of the server that made it.
        revision: of the database's schema.
        came_from: `sqlite` or `postgresql`.
        rows: how many each table has.
        files: SHA-256 of each file of the backup, by its path in it.
        artifacts: sizes of what lies in the shared folder for it, by path there.
        missing: artifacts that rows speak of and the store did not have.
    """

    format: int
    made_at: str
    version: str
    revision: str
    came_from: str
    rows: dict[str, int]
    files: dict[str, str]
    artifacts: dict[str, int]
    missing: tuple[str, ...] = ()


def read_index(folder: Path) -> Index:
    """What a backup says of itself.

    Raises:
        InvalidError: when it is none, or none that this version reads.
    """
    try:
        found = msgspec.json.decode((folder / INDEX).read_bytes(), type=Index)
    except (OSError, msgspec.MsgspecError) as error:
        detail = f"{folder} is no backup, or one that was not finished ({error}): name a folder with a {INDEX}"
        raise InvalidError("bad_backup", detail) from None
    if found.format != FORMAT:
        raise InvalidError(
            "bad_backup", f"{folder} is of format {found.format}: restore it with the version that made it"
        )
    for name in (*found.files, *found.artifacts):
        if name.startswith("/") or ".." in name.split("/"):
            raise InvalidError("bad_backup", f"{folder} names the file {name[:200]!r}: it was not made by this program")
    return found
