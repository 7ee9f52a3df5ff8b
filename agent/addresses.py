"""Addresses in the configuration: `host:port`, and paths of Unix sockets."""

from __future__ import annotations

from pathlib import Path

from agent.errors import ConfigError

UNIX_PATH_BYTES = 107  # what the kernel takes


def check_place(key: str, value: str) -> str:
    """`host:port`, with an IPv6 address in brackets; port 0 is any.

    Raises:
        ConfigError: when it is none, naming the key.
    """
    host, _, port = value.rpartition(":")
    bare = not host.startswith("[") or host.endswith("]")
    if not host or not bare or not (port.isascii() and port.isdigit()) or int(port[:9]) > 65535:
        raise ConfigError(f"{key}: {value!r} is not host:port, such as 127.0.0.1:8470")
    return value


def check_unix_path(key: str, value: str) -> str:
    """The path of a Unix socket; empty for none.

    Raises:
        ConfigError: when it is too long or its folder is not there, naming the key.
    """
    if len(value.encode()) > UNIX_PATH_BYTES:
        raise ConfigError(f"{key}: the path has more than {UNIX_PATH_BYTES} bytes: name a shorter one")
    if value and not Path(value).parent.is_dir():
        raise ConfigError(f"{key}: there is no folder {str(Path(value).parent)!r}: make it, or name another")
    return value
