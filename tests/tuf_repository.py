"""A TUF repository in memory that answers a device's messages, and can be made to lie as an attacker would."""

from __future__ import annotations

import datetime as dt
import hashlib
from collections.abc import Callable

from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import (
    DelegatedRole,
    Delegations,
    Metadata,
    MetaFile,
    Root,
    Snapshot,
    TargetFile,
    Targets,
    Timestamp,
)

from agent.protocol.codec import decode, encode
from agent.protocol.limits import LIMITS
from agent.protocol.messages import TrustNeed, TrustPiece

TOP = ("root", "targets", "snapshot", "timestamp")


class TufRepository:
    """Keys and metadata of a fleet; `files` is what the server would send, and a test may change it."""

    def __init__(self, *, models: tuple[str, ...] = ("m",), days: float = 30.0) -> None:
        self.days = days
        self.signers = {role: [CryptoSigner.generate_ed25519()] for role in TOP}
        self.files: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.root = Root(consistent_snapshot=True, expires=self.expiry())
        for role in TOP:
            self.root.add_key(self.signers[role][0].public_key, role)
        key = self.signers["targets"][0].public_key
        patterns = {f"model.{model}": f"{model}/*/*" for model in models}
        patterns |= {name: f"{name}/*" for name in ("trials", "bundles")}
        self.targets = Targets(expires=self.expiry())
        self.targets.delegations = Delegations(
            {key.keyid: key},
            {
                name: DelegatedRole(name, [key.keyid], 1, terminating=True, paths=[path])
                for name, path in patterns.items()
            },
        )
        self.delegated = {name: Targets(expires=self.expiry()) for name in patterns}
        self.snapshot = Snapshot(expires=self.expiry())
        self.timestamp = Timestamp(expires=self.expiry())
        self.publish_root()
        self.publish()

    def expiry(self) -> dt.datetime:
        return dt.datetime.now(dt.UTC).replace(microsecond=0) + dt.timedelta(days=self.days)

    def add(self, role: str, path: str, content: bytes) -> None:
        """Sign a target."""
        digest = hashlib.sha256(content).hexdigest()
        self.delegated[role].targets[path] = TargetFile(len(content), {"sha256": digest}, path)
        self.delegated[role].version += 1
        self.targets.version += 1
        self.snapshot.version += 1
        self.timestamp.version += 1
        self.publish()

    def publish_root(self) -> None:
        self.files[f"{self.root.version}.root.json"] = self.signed(self.root, "root")

    def publish(self) -> None:
        """Write every file but the root anew, as the objects are."""
        self.snapshot.meta["targets.json"] = MetaFile(self.targets.version)
        self.files[f"{self.targets.version}.targets.json"] = self.signed(self.targets, "targets")
        for name, role in self.delegated.items():
            self.snapshot.meta[f"{name}.json"] = MetaFile(role.version)
            self.files[f"{role.version}.{name}.json"] = self.signed(role, "targets")
        self.files[f"{self.snapshot.version}.snapshot.json"] = self.signed(self.snapshot, "snapshot")
        self.timestamp.snapshot_meta = MetaFile(self.snapshot.version)
        self.files["timestamp.json"] = self.signed(self.timestamp, "timestamp")

    def signed(self, what: Root | Targets | Snapshot | Timestamp, role: str) -> bytes:
        metadata: Metadata = Metadata(what)
        for signer in self.signers[role]:
            metadata.sign(signer, append=True)
        return metadata.to_bytes()

    def answer(self, payload: bytes) -> bytes:
        """What the server answers to a device's message."""
        need = decode(payload, TrustNeed)
        self.asked.append(need.file)
        data = self.files.get(need.file)
        if data is None:
            return encode(TrustPiece(need.file, need.offset, absent=True))
        piece = data[need.offset : need.offset + LIMITS.trust_piece_bytes]
        return encode(TrustPiece(need.file, need.offset, len(data), piece))

    def ask(self) -> Callable[[str, int], TrustPiece]:
        """The device's side of that exchange."""
        return lambda file, offset: decode(self.answer(encode(TrustNeed(file, offset))), TrustPiece)
