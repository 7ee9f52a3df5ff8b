"""Signing keys: files that only their owner can read, and keys in a TPM, an HSM or a smart card by PKCS#11.

Nothing here signs by itself: python-tuf and securesystemslib do, with what this opens.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from urllib.parse import parse_qsl, unquote, unquote_to_bytes

from cryptography.hazmat.primitives.serialization import load_pem_private_key
from securesystemslib.exceptions import UnsupportedLibraryError
from securesystemslib.signer import CryptoSigner, HSMSigner, Signer

from fleet_server.errors import InvalidError

PKCS11 = "pkcs11:"
SUFFIX = ".key.pem"
PIN_VARIABLE = "SHOAL_PKCS11_PIN"


class KeyFolder:
    """Ed25519 keys as PKCS#8 PEM files in a folder, each named by its TUF key id.

    Raises:
        InvalidError: from every method, when the folder can't be used or holds what is no key.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def load(self) -> dict[str, Signer]:
        """Every key, by its id."""
        found: dict[str, Signer] = {}
        for file in sorted(self.path.glob(f"*{SUFFIX}")):
            try:
                signer = CryptoSigner(load_pem_private_key(file.read_bytes(), None))
            except (OSError, ValueError, TypeError) as error:
                raise InvalidError("bad_key", f"{file} can't be read as a private key: {error}", field="keys") from None
            found[signer.public_key.keyid] = signer
        return found

    def make(self) -> Signer:
        """A new key; it is on the disk before this returns."""
        signer = CryptoSigner.generate_ed25519()
        file = self.path / f"{signer.public_key.keyid}{SUFFIX}"
        try:
            self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
            descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "wb") as opened:
                opened.write(signer.private_bytes)
                opened.flush()
                os.fsync(opened.fileno())
        except OSError as error:
            detail = f"{self.path} can't take a key ({error.strerror}): name a folder that can be written"
            raise InvalidError("bad_key_folder", detail, field="keys") from None
        return signer

    def remove(self, keyid: str) -> None:
        """Throw a key away, if it is here."""
        (self.path / f"{keyid}{SUFFIX}").unlink(missing_ok=True)


def open_signer(where: str, ask_pin: Callable[[], str]) -> Signer:
    """The key that an operator names: a folder (a key is made there when it has none) or a PKCS#11 URI (RFC 7512).

    A URI has `token`, `id` and `module-path`, such as `pkcs11:token=shoal;id=%02?module-path=/usr/lib/module.so`; its
    key is an EC key on P-256 or P-384 that exists.

    Args:
        where: folder or URI.
        ask_pin: for the token's PIN, where SHOAL_PKCS11_PIN does not hold it.

    Raises:
        InvalidError: naming what is wrong with it.
    """
    if where.startswith(PKCS11):
        return _open_pkcs11(where, ask_pin)
    folder = KeyFolder(Path(where))
    keys = list(folder.load().values())
    if len(keys) > 1:
        raise InvalidError("many_keys", f"{where} holds {len(keys)} keys: name a folder a key", field="keys")
    return keys[0] if keys else folder.make()


def _open_pkcs11(uri: str, ask_pin: Callable[[], str]) -> Signer:
    path, _, query = uri.removeprefix(PKCS11).partition("?")
    attributes = dict(part.partition("=")[::2] for part in path.split(";") if part)
    module = dict(parse_qsl(query)).get("module-path") or os.environ.get("PYKCS11LIB")
    if not module or not attributes.get("id"):
        detail = f"{uri!r} lacks its id or its module-path: pkcs11:token=NAME;id=%02?module-path=/path/of/the/module.so"
        raise InvalidError("bad_pkcs11_uri", detail, field="keys")
    # securesystemslib reads the module from this variable, and at every signature again.
    os.environ["PYKCS11LIB"] = module
    keyid = int.from_bytes(unquote_to_bytes(attributes["id"]), "big")
    token = unquote(attributes["token"]) if "token" in attributes else None

    def pin(_: str) -> str:
        return os.environ.get(PIN_VARIABLE) or ask_pin()

    try:
        found, public = HSMSigner.import_(keyid, token, pin)
        return HSMSigner.from_priv_key_uri(found, public, pin)
    except (ValueError, UnsupportedLibraryError) as error:
        remedy = "; install it with `pip install 'shoal[pkcs11]'`" if isinstance(error, UnsupportedLibraryError) else ""
        detail = f"{uri!r} can't be used: {error}{remedy}"
        raise InvalidError("bad_pkcs11_key", detail, field="keys") from None
