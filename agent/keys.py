"""Keys and signing requests. `cryptography` is imported when one is needed, which is when enrolling and renewing."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from agent.errors import IdentityError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey


TOKEN_KEY = "pkcs11:"  # noqa: S105 (how a URI begins)


def new_key(token_uri: str = "") -> str:
    """A new key (EC P-256, FIPS 186-5) as PEM; or the URI of one in a token, which is made when it is not there.

    Raises:
        IdentityError: when the token does not work.
    """
    if token_uri:
        from agent.pkcs11_key import make_token_key

        make_token_key(token_uri)
        return token_uri
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    ).decode()


def load_key(text: str) -> EllipticCurvePrivateKey:
    """The key of a PEM text, or of a `pkcs11:` URI.

    Raises:
        IdentityError: when it is none.
    """
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    if text.startswith(TOKEN_KEY):
        from agent.pkcs11_key import TokenKey, parse_uri

        return TokenKey(parse_uri(text))
    try:
        key = serialization.load_pem_private_key(text.encode(), password=None)
    except (ValueError, TypeError) as error:
        raise IdentityError(f"the device's key can't be read ({error}): enrol with --new-key") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise IdentityError("the device's key is no elliptic-curve key: enrol with --new-key")
    return key


def fingerprint(text: str) -> str:
    """SHA-256 of the public key (SubjectPublicKeyInfo in DER), hexadecimal, of a key or a certificate as PEM."""
    from cryptography import x509
    from cryptography.hazmat.primitives import serialization

    public = (
        x509.load_pem_x509_certificate(text.encode()).public_key()
        if "CERTIFICATE" in text
        else load_key(text).public_key()
    )
    der = public.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(der).hexdigest()


def signing_request(text: str, device_id: str) -> str:
    """A signing request (PKCS #10, RFC 2986) for a key, as PEM; its common name is the device's id."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.x509.oid import NameOID

    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, device_id)])
    request = x509.CertificateSigningRequestBuilder(subject_name=name).sign(load_key(text), hashes.SHA256())
    return request.public_bytes(serialization.Encoding.PEM).decode()


def sign(text: str, content: bytes) -> bytes:
    """A signature (ECDSA with SHA-256) by a key."""
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec

    return load_key(text).sign(content, ec.ECDSA(hashes.SHA256()))


def pinned(bundle: str, pin: str) -> str:
    """The certificate in a bundle (PEM) whose public key has a fingerprint.

    Raises:
        IdentityError: when none has.
    """
    from cryptography import x509
    from cryptography.hazmat.primitives import serialization

    try:
        certificates = x509.load_pem_x509_certificates(bundle.encode())
    except ValueError:
        certificates = []
    for one in certificates:
        pem = one.public_bytes(serialization.Encoding.PEM).decode()
        if fingerprint(pem) == pin:
            return pem
    raise IdentityError("the server's CA is not the one that the token (or --ca-pin) names: somebody may stand between")
