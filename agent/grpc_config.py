"""Whether and where the local inference API is served by gRPC too, as the configuration says: table `[grpc]`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from agent.addresses import check_place, check_unix_path
from agent.tables import Table


@dataclass(frozen=True)
class GrpcConfig:
    """The gRPC form of the local inference API.

    Attributes:
        serve: whether there is one; it needs the extra `grpc`.
        listen: `host:port`.
        unix_socket: path of its Unix socket; empty for none.
    """

    serve: bool = False
    listen: str = "127.0.0.1:8471"
    unix_socket: str = ""

    @property
    def addresses(self) -> list[str]:
        """Where to listen, as the library has it; empty when it is off."""
        unix = [f"unix:{self.unix_socket}"] if self.unix_socket else []
        return [self.listen, *unix] if self.serve else []


def read_grpc(values: Any) -> GrpcConfig:
    """Read the table.

    Raises:
        ConfigError: naming the key and the remedy.
    """
    table = Table("grpc", values)
    found = GrpcConfig(
        serve=table.flag("serve"),
        listen=check_place("grpc.listen", table.text("listen", GrpcConfig.listen)),
        unix_socket=check_unix_path("grpc.unix_socket", table.text("unix_socket", "")),
    )
    table.refuse_rest()
    return found
