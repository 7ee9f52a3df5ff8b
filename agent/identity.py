"""The device's identity on its disk: key, certificate, and where to connect. Each is one file, swapped as a whole.

`identity.json` is what holds, and `identity.copy.json` stands in where it is damaged: a device that has lost its key
has to be enrolled by somebody. `enrolment.json` and `next.json` are those that are being got or tried. `*.pem` beside
them are copies, because OpenSSL reads files. Keys lie here (0600), or in a PKCS #11 token that the file names.
"""

from __future__ import annotations

import base64
import contextlib
import logging
import ssl
from pathlib import Path
from typing import Any

import msgspec

from agent.errors import IdentityError
from agent.files import remove_durably, write_durably

log = logging.getLogger(__name__)
CURRENT = "identity.json"
COPY = "identity.copy.json"
NEXT = "next.json"
ENROLLING = "enrolment.json"


class Identity(msgspec.Struct, frozen=True):
    """Who the device is. Times are Unix seconds.

    Attributes:
        device_id: its name, as the certificate has it.
        key: the private key as PEM (PKCS #8), or the `pkcs11:` URI (RFC 7512) of one in a token.
        key_sha256: of its public key: the fingerprint that is compared by people.
        certificate: with its chain, as PEM; empty while there is none.
        ca: what the broker is checked against, as PEM.
        broker: where to connect.
        fleet: whose device it is.
        not_before: the certificate is valid from.
        not_after: the certificate is valid until.
        server: where it enrolled.
        trust_root: the TUF root that came with it, if any.
    """

    device_id: str
    key: str
    key_sha256: str
    certificate: str = ""
    ca: str = ""
    broker: str = ""
    fleet: str = ""
    not_before: float = 0.0
    not_after: float = 0.0
    server: str = ""
    trust_root: dict[str, Any] | None = None


def identity_folder(state_dir: Path) -> Path:
    """Where a device keeps its identity."""
    return state_dir / "identity"


def load_identity(folder: Path, name: str = CURRENT) -> Identity | None:
    """The identity in a file; None when there is none.

    Raises:
        IdentityError: when it can't be read, and of the current one its copy can't be either.
    """
    try:
        return _read(folder / name)
    except IdentityError as error:
        copy = _readable(folder / COPY) if name == CURRENT else None
        if copy is None:
            raise
        log.error("%s; until then its copy is used", error)  # noqa: TRY400 (a sentence for people, no traceback)
        return copy


def _readable(path: Path) -> Identity | None:
    try:
        return _read(path)
    except IdentityError:
        return None


def _read(path: Path) -> Identity | None:
    try:
        return msgspec.json.decode(path.read_bytes(), type=Identity)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise IdentityError(
            f"{path} can't be read ({error.strerror}): run the agent as the user that enrolled"
        ) from None
    except msgspec.MsgspecError as error:
        raise IdentityError(f"{path} is damaged ({error}): remove it and enrol again (shoal-agent enroll)") from None


def save_identity(folder: Path, identity: Identity, name: str = CURRENT) -> None:
    """Keep an identity: after a power cut the file is the old or the new one.

    Raises:
        IdentityError: when the folder can't be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        text = msgspec.json.format(msgspec.json.encode(identity))
        for one in (CURRENT, COPY) if name == CURRENT else (name,):
            write_durably(folder / one, text)
    except OSError as error:
        raise IdentityError(f"{folder} can't be written ({error.strerror}): see state_dir") from None


def save_certificates(folder: Path, identity: Identity) -> None:
    """Keep the certificates as PEM files too, for a TLS proxy that connects in the agent's place.

    Raises:
        IdentityError: when the folder can't be written.
    """
    try:
        write_durably(folder / "certificate.pem", identity.certificate.encode())
        write_durably(folder / "ca.pem", identity.ca.encode())
    except OSError as error:
        raise IdentityError(f"{folder} can't be written ({error.strerror}): see state_dir") from None


def drop_identity(folder: Path, name: str) -> None:
    """Remove one that is of no use."""
    if folder.is_dir():
        remove_durably(folder / name)


def chain_file(folder: Path, name: str = CURRENT) -> Path:
    """The copy of an identity's key and certificate that OpenSSL reads, as `load_into` left it."""
    return (folder / name).with_suffix(".pem")


def load_into(context: ssl.SSLContext, folder: Path, identity: Identity, name: str = CURRENT) -> None:
    """Let a TLS context connect with the identity's certificate and believe its CA.

    Raises:
        IdentityError: when key and certificate do not fit, or the key is not where OpenSSL finds it.
    """
    chain = chain_file(folder, name)
    in_token = identity.key.startswith("pkcs11:")
    key = provider_pem(identity.key) if in_token else identity.key
    try:
        _keep_copy(chain, (key + identity.certificate).encode())
        context.load_verify_locations(cadata=identity.ca)
        context.load_cert_chain(chain)
    except (OSError, ValueError) as error:  # SSLError is an OSError
        if in_token:
            raise IdentityError(
                f"OpenSSL here can't use the key in the token ({error}): install pkcs11-provider 1.0 or newer and name "
                "it in OPENSSL_CONF, or connect through a TLS proxy on this machine (docs/operations.md)"
            ) from None
        raise IdentityError(f"{chain} can't be used ({error}): enrol again (shoal-agent enroll)") from None


def provider_pem(uri: str) -> str:
    """How a PEM file names a key in a token to OpenSSL's pkcs11-provider: a DER sequence of a version and the URI."""
    version, text = (b"\x0c" + _der_length(len(one)) + one for one in (b"PKCS#11 Provider URI v1.0", uri.encode()))
    der = b"\x30" + _der_length(len(version) + len(text)) + version + text
    label = "PKCS#11 PROVIDER URI"
    body = base64.encodebytes(der).decode()
    return f"-----BEGIN {label}-----\n{body}-----END {label}-----\n"


def _der_length(length: int) -> bytes:
    if length < 0x80:
        return bytes([length])
    content = length.to_bytes((length.bit_length() + 7) // 8)
    return bytes([0x80 | len(content)]) + content


def _keep_copy(path: Path, content: bytes) -> None:
    """Write a file that can be made again, unless it is as it ought to be: a disk that can't be written may hold it."""
    with contextlib.suppress(OSError):
        if path.read_bytes() == content:
            return
    write_durably(path, content)
