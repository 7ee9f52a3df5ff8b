"""Keys in a PKCS #11 token: made and kept in SoftHSM, used to enrol and to renew."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from agent.errors import IdentityError
from agent.identity import provider_pem
from agent.keys import fingerprint, load_key, new_key, sign, signing_request
from agent.pkcs11_key import parse_uri
from fleet_server.enrolment.service import renew
from tests.broker_peer import secure_server
from tests.softhsm import MODULE, SoftHsm


@pytest.fixture(scope="module")
def uri(tokens: SoftHsm) -> str:
    return f"pkcs11:token=shoal%20test;object=cam-1?module-path={tokens.module}&pin-source=file:{tokens.pin_file}"


def test_a_device_enrols_and_renews_with_a_key_that_it_can_not_read(uri: str, tmp_path: Path) -> None:
    key = new_key(uri)
    assert fingerprint(new_key(uri)) == fingerprint(key), "it is made once"
    request = x509.load_pem_x509_csr(signing_request(key, "cam-1").encode())
    assert request.is_signature_valid
    with pytest.raises(IdentityError, match="only signs"):
        load_key(key).private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    with secure_server(tmp_path / "server") as server:
        given = server.identity("cam-1", key)
        assert fingerprint(given.certificate) == fingerprint(key)
        csr = signing_request(key, "cam-1")
        with server.app.state.database.write() as session:
            held = renew(session, server.app.state.authority, "cam-1", csr, sign(key, csr.encode()))
            assert held.key_sha256 == fingerprint(key)


def test_what_is_wrong_with_a_token_is_said(uri: str) -> None:
    for text, said in (
        ("pkcs11:object=o?module-path=m", "token="),
        (uri.replace("shoal%20test", "other"), "token 'other'"),
        (uri.replace("pin-source=file:", "pin-source=file:/nowhere"), "pin-source"),
        (uri.replace(str(MODULE), "/nowhere.so"), "/nowhere.so"),
        (uri.replace("object=cam-1", "object=none"), "'none'"),
        (uri.partition("&")[0] + "&pin-value=9999", "does not work"),
    ):
        with pytest.raises(IdentityError, match=said):
            fingerprint(text)
    assert parse_uri(uri).pin == "1234"


def test_how_openssl_s_provider_is_told_of_a_key() -> None:
    long = "pkcs11:token=" + "t" * 200
    for text in ("pkcs11:token=t", long):
        done = subprocess.run(
            ["openssl", "asn1parse"], input=provider_pem(text), capture_output=True, text=True, check=True
        )
        assert [line.rpartition(":")[0].split()[-1] for line in done.stdout.splitlines()[1:]]
        assert done.stdout.count("UTF8STRING") == 2
        assert text in done.stdout
