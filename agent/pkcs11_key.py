"""A key in a PKCS #11 token (TPM, HSM): made there, and it stays there. It needs `pip install 'shoal[pkcs11]'`.

A key is named by a URI (RFC 7512): `pkcs11:token=T;object=O?module-path=/usr/lib/…so&pin-source=file:/etc/shoal/pin`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import unquote

from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, utils

from agent.errors import IdentityError


@dataclass(frozen=True)
class TokenUri:
    """What a URI names.

    Attributes:
        token: label of the token.
        label: of the key in it.
        module: path of the token's library.
        pin: of the user; empty where the token wants none.
    """

    token: str
    label: str
    module: str
    pin: str


def parse_uri(text: str) -> TokenUri:
    """Read a URI.

    Raises:
        IdentityError: naming the attribute that is missing, or the PIN's file that can't be read.
    """
    path, _, query = text.removeprefix("pkcs11:").partition("?")
    pairs = [part.partition("=") for part in [*path.split(";"), *query.split("&")] if part]
    given = {name: unquote(value) for name, _, value in pairs}
    for name in ("token", "object", "module-path"):
        if not given.get(name):
            raise IdentityError(
                f"key: {name}= is missing in it, such as pkcs11:token=T;object=O?module-path=/usr/lib/….so"
            )
    pin = given.get("pin-value", "")
    if "pin-source" in given:
        try:
            pin = Path(given["pin-source"].removeprefix("file:")).read_text().strip()
        except OSError as error:
            raise IdentityError(f"key: the file of pin-source can't be read ({error.strerror})") from None
    return TokenUri(given["token"], given["object"], given["module-path"], pin)


class TokenKey(ec.EllipticCurvePrivateKey):
    """The key as `cryptography` wants one: the token signs, and nothing else can be had of it.

    Raises:
        IdentityError: from each method, when the token does not work.
    """

    def __init__(self, uri: TokenUri) -> None:
        self._uri = uri

    def sign(self, data: Any, signature_algorithm: ec.EllipticCurveSignatureAlgorithm) -> bytes:
        """ECDSA; the hash is made here."""
        if not isinstance(signature_algorithm, ec.ECDSA) or not isinstance(
            signature_algorithm.algorithm, hashes.SHA256
        ):
            raise IdentityError("key: it signs with ECDSA and SHA-256 only")
        import pkcs11

        digest = hashes.Hash(hashes.SHA256())
        digest.update(data)
        with _session(self._uri) as session:
            key = _find(session, pkcs11.ObjectClass.PRIVATE_KEY, self._uri)
            raw = bytes(key.sign(digest.finalize(), mechanism=pkcs11.Mechanism.ECDSA))
        half = len(raw) // 2
        return utils.encode_dss_signature(int.from_bytes(raw[:half]), int.from_bytes(raw[half:]))

    def public_key(self) -> ec.EllipticCurvePublicKey:
        """Its public half."""
        import pkcs11
        from pkcs11.util.ec import encode_ec_public_key

        with _session(self._uri) as session:
            der = encode_ec_public_key(_find(session, pkcs11.ObjectClass.PUBLIC_KEY, self._uri))
        public = serialization.load_der_public_key(der)
        if not isinstance(public, ec.EllipticCurvePublicKey):
            raise IdentityError(f"key: {self._uri.label!r} is no elliptic-curve key")
        return public

    @property
    def curve(self) -> ec.EllipticCurve:
        """P-256."""
        return self.public_key().curve

    @property
    def key_size(self) -> int:
        """Of its curve, in bits."""
        return self.curve.key_size

    def exchange(self, algorithm: ec.ECDH, peer_public_key: ec.EllipticCurvePublicKey) -> bytes:
        """Not what it is for."""
        self._stays(algorithm, peer_public_key)

    def private_numbers(self) -> ec.EllipticCurvePrivateNumbers:
        """It does not leave the token."""
        self._stays()

    def private_bytes(
        self,
        encoding: serialization.Encoding,
        format: serialization.PrivateFormat,  # noqa: A002 (the library's name)
        encryption_algorithm: serialization.KeySerializationEncryption,
    ) -> bytes:
        """It does not leave the token."""
        self._stays(encoding, format, encryption_algorithm)

    def __copy__(self) -> TokenKey:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> TokenKey:
        return self

    def _stays(self, *_: object) -> NoReturn:
        raise IdentityError("key: it is in a PKCS #11 token, which only signs")


def make_token_key(text: str) -> TokenKey:
    """The key that a URI names; made in the token (P-256, not extractable) when it is not there.

    Raises:
        IdentityError: when the token does not work.
    """
    import pkcs11
    from pkcs11.util.ec import encode_named_curve_parameters

    uri = parse_uri(text)
    with _session(uri, write=True) as session:
        wanted = {pkcs11.Attribute.CLASS: pkcs11.ObjectClass.PRIVATE_KEY, pkcs11.Attribute.LABEL: uri.label}
        if next(iter(session.get_objects(wanted)), None) is None:
            curve = {pkcs11.Attribute.EC_PARAMS: encode_named_curve_parameters("secp256r1")}
            domain = session.create_domain_parameters(pkcs11.KeyType.EC, curve, local=True)
            stays = {pkcs11.Attribute.SENSITIVE: True, pkcs11.Attribute.EXTRACTABLE: False}
            domain.generate_keypair(label=uri.label, store=True, private_template=stays)
    return TokenKey(uri)


@contextmanager
def _session(uri: TokenUri, *, write: bool = False) -> Iterator[Any]:
    """A session with the token; whatever its library raises becomes an error that names the key's parts."""
    try:
        import pkcs11
    except ImportError:
        raise IdentityError("key: pkcs11: needs the library python-pkcs11: pip install 'shoal[pkcs11]'") from None
    try:
        token = pkcs11.lib(uri.module).get_token(token_label=uri.token)
        with token.open(rw=write, user_pin=uri.pin or None) as session:
            yield session
    except (pkcs11.PKCS11Error, RuntimeError) as error:
        reason = str(error) or type(error).__name__
        raise IdentityError(f"key: token {uri.token!r} of {uri.module} does not work: {reason}") from None


def _find(session: Any, kind: Any, uri: TokenUri) -> Any:
    import pkcs11

    wanted = {pkcs11.Attribute.CLASS: kind, pkcs11.Attribute.LABEL: uri.label}
    found = next(iter(session.get_objects(wanted)), None)
    if found is None:
        raise IdentityError(f"key: there is no {uri.label!r} in token {uri.token!r}: shoal-agent enroll makes it")
    return found
