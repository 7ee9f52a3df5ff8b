"""The fleet's certificate authority (X.509, RFC 5280): certificates of devices and servers, and the revocation list.

It knows keys and certificates only; who gets one is decided in `fleet_server.enrolment`. Keys of devices never come
here: a device sends a request (PKCS #10, RFC 2986) that its key has signed.
"""

from __future__ import annotations

import datetime as dt
import fcntl
import hashlib
import ipaddress
import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from agent.protocol.topics import DEVICE_HOST
from fleet_server.errors import InvalidError, UnavailableError

log = logging.getLogger(__name__)
CA_DAYS = 3650
SERVER_DAYS = 365
CLOCK_SLACK = dt.timedelta(minutes=10)  # devices' clocks may be behind
CRL_DAYS = 30
CSR_BYTES = 16_384
RSA_BITS = range(2048, 8193)
CURVES = ("secp256r1", "secp384r1", "secp521r1")
SigningKey = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey


@dataclass(frozen=True)
class IssuedCertificate:
    """A certificate as PEM, with what is kept of it.

    Attributes:
        pem: the certificate, and the intermediate certificates below the root where there are any.
        serial: lower-case hexadecimal.
        key_sha256: SHA-256 of the subject's public key (SubjectPublicKeyInfo, DER), lower-case hexadecimal.
        not_before: valid from.
        not_after: valid until.
    """

    pem: str
    serial: str
    key_sha256: str
    not_before: dt.datetime
    not_after: dt.datetime


@dataclass(frozen=True)
class SigningRequest:
    """A request whose signature holds: whoever sent it has the key.

    Attributes:
        common_name: the name it asks for.
        key_sha256: SHA-256 of its public key.
        csr: as parsed.
    """

    common_name: str
    key_sha256: str
    csr: x509.CertificateSigningRequest


class FleetCa:
    """Issues and revokes. Several servers may use the same files.

    Args:
        certificates: the issuing certificate first, then those above it up to the root.
        key: of the issuing certificate.

    Raises:
        InvalidError: when they do not belong together, or may not issue.
    """

    def __init__(self, certificates: Sequence[x509.Certificate], key: SigningKey) -> None:
        self._certificate = certificates[0]
        self._key = key
        self._intermediates = [one for one in certificates if one.issuer != one.subject]
        self.bundle = "".join(_pem(one) for one in certificates)
        if key_digest(self._certificate.public_key()) != key_digest(key.public_key()):
            raise InvalidError("ca_mismatch", "SHOAL_CA_KEY is not the key of the first certificate of SHOAL_CA_CERT")
        try:
            usable = self._certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
        except x509.ExtensionNotFound:
            usable = False
        if not usable:
            raise InvalidError("ca_mismatch", "SHOAL_CA_CERT: its first certificate is none of a CA (basicConstraints)")

    @classmethod
    def open(cls, folder: Path, fleet: str, *, certificate: Path | None = None, key: Path | None = None) -> FleetCa:
        """The CA of files that an operator brought, or the one in `folder`, made when it is not there.

        Args:
            folder: of the CA that is made here.
            fleet: named in its certificate.
            certificate: PEM file of the operator's: the issuing certificate, then those above it.
            key: PEM file with its key, not encrypted.

        Raises:
            InvalidError: when the files can't be used; it names the setting.
            UnavailableError: when the folder can't be written.
        """
        own = certificate is None or key is None
        if certificate is None or key is None:
            certificate, key = folder / "ca.pem", folder / "ca.key"
            try:
                _make_once(folder, fleet)
            except OSError as error:
                detail = f"the CA can't be made in {folder} ({error.strerror}): see SHOAL_STATE_DIR"
                raise UnavailableError("ca", detail) from None
        try:
            certificates = x509.load_pem_x509_certificates(certificate.read_bytes())
            loaded = serialization.load_pem_private_key(key.read_bytes(), password=None)
        except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
            names = f"{certificate} and {key}" if own else "SHOAL_CA_CERT and SHOAL_CA_KEY"
            detail = f"{names} can't be used as PEM files of a CA and its unencrypted key: {error}"
            raise InvalidError("ca_unusable", detail) from None
        if not isinstance(loaded, (ec.EllipticCurvePrivateKey, rsa.RSAPrivateKey)):
            raise InvalidError("ca_unusable", "SHOAL_CA_KEY: a CA's key is an elliptic-curve or RSA one")
        return cls(certificates, loaded)

    @property
    def pin(self) -> str:
        """SHA-256 of the issuing certificate's public key, hexadecimal: what enrolment tokens carry."""
        return key_digest(self._certificate.public_key())

    def issue_device(
        self, request: SigningRequest, device_id: str, fleet: str, lifetime: dt.timedelta
    ) -> IssuedCertificate:
        """A device's client certificate. Nothing but the key is taken from the request."""
        uri = x509.UniformResourceIdentifier(f"shoal:device:{device_id}")
        # A server to its peers on a LAN too. The DNS name, of no real host, is what peers ask for; and where there is
        # one, no client takes the common name for a host's name.
        names = [uri, x509.DNSName(DEVICE_HOST)]
        return self._issue(
            request.csr.public_key(),  # type: ignore[arg-type]  # `read_request` let only these kinds of key pass
            _name(device_id, fleet),
            lifetime,
            [ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH],
            names,
        )

    def issue_client(
        self, common_name: str, fleet: str, lifetime: dt.timedelta
    ) -> tuple[IssuedCertificate, ec.EllipticCurvePrivateKey]:
        """A client certificate with a new key, for the server's own connections."""
        key = ec.generate_private_key(ec.SECP256R1())
        usage = [ExtendedKeyUsageOID.CLIENT_AUTH]
        return self._issue(key.public_key(), _name(common_name, fleet), lifetime, usage, []), key

    def issue_listener(self, request: SigningRequest, common_name: str, fleet: str) -> IssuedCertificate:
        """A client certificate for a key that was made elsewhere, valid for a year."""
        usage, lifetime = [ExtendedKeyUsageOID.CLIENT_AUTH], dt.timedelta(days=SERVER_DAYS)
        return self._issue(request.csr.public_key(), _name(common_name, fleet), lifetime, usage, [])  # type: ignore[arg-type]

    def issue_server(
        self, request: SigningRequest | ec.EllipticCurvePublicKey, names: Sequence[str], fleet: str
    ) -> IssuedCertificate:
        """A server's certificate for host names and addresses, valid for a year."""
        public = request.csr.public_key() if isinstance(request, SigningRequest) else request
        usage = [ExtendedKeyUsageOID.SERVER_AUTH]
        lifetime = dt.timedelta(days=SERVER_DAYS)
        return self._issue(public, _name(names[0][:64], fleet), lifetime, usage, [_alternative(one) for one in names])  # type: ignore[arg-type]

    def derive_secret(self, purpose: str) -> bytes:
        """32 bytes that follow from the CA's key: the same on every server with that key, and nowhere to be kept."""
        der = self._key.private_bytes(
            serialization.Encoding.DER, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        return HKDF(hashes.SHA256(), 32, salt=None, info=f"shoal {purpose}".encode()).derive(der)

    def revocation_list(self, revoked: Iterable[tuple[str, dt.datetime]], now: dt.datetime) -> str:
        """The CRL as PEM, valid for 30 days.

        Args:
            revoked: serials in hexadecimal, and since when.
            now: its time of issue. Of two lists a verifier may hold it believes the later one.
        """
        builder = x509.CertificateRevocationListBuilder(
            issuer_name=self._certificate.subject, last_update=now, next_update=now + dt.timedelta(days=CRL_DAYS)
        )
        builder = builder.add_extension(x509.CRLNumber(int(now.timestamp())), critical=False)
        builder = builder.add_extension(self._authority_key(), critical=False)
        for serial, since in revoked:
            entry = x509.RevokedCertificateBuilder(serial_number=int(serial, 16), revocation_date=since).build()
            builder = builder.add_revoked_certificate(entry)
        return _pem(builder.sign(self._key, hashes.SHA256()))

    def _issue(
        self,
        public: ec.EllipticCurvePublicKey | rsa.RSAPublicKey | ed25519.Ed25519PublicKey,
        subject: x509.Name,
        lifetime: dt.timedelta,
        usage: list[x509.ObjectIdentifier],
        alternatives: list[x509.GeneralName],
    ) -> IssuedCertificate:
        now = dt.datetime.now(dt.UTC).replace(microsecond=0)
        until = min(now + lifetime, self._certificate.not_valid_after_utc)
        serial = x509.random_serial_number()
        rsa_key = isinstance(public, rsa.RSAPublicKey)
        builder = (
            x509.CertificateBuilder(issuer_name=self._certificate.subject, subject_name=subject, public_key=public)
            .serial_number(serial)
            .not_valid_before(now - CLOCK_SLACK)
            .not_valid_after(until)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(encipher=rsa_key), critical=True)
            .add_extension(x509.ExtendedKeyUsage(usage), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
            .add_extension(self._authority_key(), critical=False)
        )
        if alternatives:
            builder = builder.add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
        certificate = builder.sign(self._key, hashes.SHA256())
        return IssuedCertificate(
            pem=_pem(certificate) + "".join(_pem(one) for one in self._intermediates),
            serial=f"{serial:x}",
            key_sha256=key_digest(public),
            not_before=now,
            not_after=until,
        )

    def _authority_key(self) -> x509.AuthorityKeyIdentifier:
        try:
            own = self._certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
        except x509.ExtensionNotFound:
            return x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        return x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(own)


def read_request(pem: str) -> SigningRequest:
    """Parse a signing request and check that it was signed by the key it is for.

    Raises:
        InvalidError: naming what is wrong.
    """
    if len(pem) > CSR_BYTES:
        raise _bad_request(f"it has more than {CSR_BYTES} characters")
    try:
        csr = x509.load_pem_x509_csr(pem.encode("ascii"))
        public = csr.public_key()
        signed = csr.is_signature_valid
        names = csr.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    except (ValueError, TypeError, UnsupportedAlgorithm, InvalidSignature, x509.InvalidVersion) as error:
        raise _bad_request(f"it is no PEM of PKCS #10 ({str(error)[:200]})") from None
    if not signed:
        raise _bad_request("its signature is wrong")
    if not _good_key(public):
        raise _bad_request("its key is none of EC P-256, P-384, P-521, Ed25519, or RSA of 2048 to 8192 bits")
    if len(names) != 1 or not isinstance(names[0].value, str):
        raise _bad_request("its subject needs one common name")
    return SigningRequest(common_name=names[0].value, key_sha256=key_digest(public), csr=csr)


def verify_signature(certificate_pem: str, signature: bytes, signed: bytes) -> bool:
    """Whether the key of a certificate made a signature (ECDSA or RSA PKCS #1 v1.5 with SHA-256, or Ed25519)."""
    public = x509.load_pem_x509_certificate(certificate_pem.encode()).public_key()
    try:
        match public:
            case ec.EllipticCurvePublicKey():
                public.verify(signature, signed, ec.ECDSA(hashes.SHA256()))
            case rsa.RSAPublicKey():
                from cryptography.hazmat.primitives.asymmetric import padding

                public.verify(signature, signed, padding.PKCS1v15(), hashes.SHA256())
            case ed25519.Ed25519PublicKey():
                public.verify(signature, signed)
            case _:
                return False
    except InvalidSignature:
        return False
    return True


def key_digest(public: object) -> str:
    """SHA-256 of a public key (SubjectPublicKeyInfo in DER), lower-case hexadecimal (as in RFC 7469)."""
    der: bytes = public.public_bytes(  # type: ignore[attr-defined]
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return hashlib.sha256(der).hexdigest()


def key_pem(key: ec.EllipticCurvePrivateKey) -> str:
    """A private key as PEM (PKCS #8), not encrypted."""
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    ).decode()


def write_private(path: Path, text: str) -> None:
    """Write a file that only its owner may read: whole or not at all, also when the power fails."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def _make_once(folder: Path, fleet: str) -> None:
    """Under a lock, as two servers may start at once; the certificate is written last: where it is, its key is."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "ca.pem").exists():
            _make(folder, fleet)


def _make(folder: Path, fleet: str) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    now = dt.datetime.now(dt.UTC).replace(microsecond=0)
    name = x509.Name(
        [
            x509.NameAttribute(NameOID.COMMON_NAME, "Shoal fleet CA"),
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, fleet),
        ]
    )
    identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    certificate = (
        x509.CertificateBuilder(issuer_name=name, subject_name=name, public_key=key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(days=1))
        .not_valid_after(now + dt.timedelta(days=CA_DAYS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(encipher=False, ca=True), critical=True)
        .add_extension(identifier, critical=False)
        .sign(key, hashes.SHA256())
    )
    write_private(folder / "ca.key", key_pem(key))
    write_private(folder / "ca.pem", _pem(certificate))
    log.warning(
        "made a fleet CA in %s: whoever reads ca.key there can speak for every device. Keep a copy of it offline, or "
        "bring a CA of your own by SHOAL_CA_CERT and SHOAL_CA_KEY before devices enrol",
        folder,
    )


def _good_key(public: object) -> bool:
    match public:
        case ec.EllipticCurvePublicKey():
            return public.curve.name in CURVES
        case rsa.RSAPublicKey():
            return public.key_size in RSA_BITS
        case ed25519.Ed25519PublicKey():
            return True
        case _:
            return False


def _key_usage(*, encipher: bool, ca: bool = False) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not ca,
        content_commitment=False,
        key_encipherment=encipher,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=ca,
        crl_sign=ca,
        encipher_only=False,
        decipher_only=False,
    )


def _name(common_name: str, fleet: str) -> x509.Name:
    return x509.Name(
        [x509.NameAttribute(NameOID.COMMON_NAME, common_name), x509.NameAttribute(NameOID.ORGANIZATION_NAME, fleet)]
    )


def _alternative(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        pass
    try:
        return x509.DNSName(name)
    except ValueError:
        raise InvalidError("bad_name", f"{name[:100]!r} is no host name or address", field="names") from None


def _pem(value: x509.Certificate | x509.CertificateRevocationList) -> str:
    return value.public_bytes(serialization.Encoding.PEM).decode()


def _bad_request(reason: str) -> InvalidError:
    detail = f"csr: {reason}; make one by `shoal-agent enroll` or `openssl req -new`"
    return InvalidError("bad_csr", detail, field="csr")
