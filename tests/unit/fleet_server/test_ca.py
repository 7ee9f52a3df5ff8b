"""The fleet's CA: what it issues, whose it is, and how its list of revoked certificates grows."""

from __future__ import annotations

import base64
import datetime as dt
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID

from agent.errors import IdentityError
from agent.identity import Identity, load_identity, save_identity
from agent.keys import fingerprint, new_key, pinned, signing_request
from agent.protocol.topics import DEVICE_HOST
from agent.renewal import due_at
from fleet_server.errors import InvalidError
from fleet_server.gateway.broker_files import BrokerFiles
from fleet_server.settings import Settings
from fleet_server.trust.ca import FleetCa, read_request

DAY = dt.timedelta(days=1)


def test_it_is_made_once_and_kept_private(tmp_path: Path) -> None:
    first, again = (FleetCa.open(tmp_path / "ca", "f") for _ in range(2))
    assert first.pin == again.pin == fingerprint(first.bundle)
    assert oct((tmp_path / "ca" / "ca.key").stat().st_mode & 0o777) == "0o600"
    assert pinned(first.bundle, first.pin) == first.bundle
    with pytest.raises(IdentityError, match="not the one"):
        pinned(first.bundle, "0" * 64)


def test_a_device_s_certificate_says_who_it_is_and_may_nothing_else(tmp_path: Path) -> None:
    ca = FleetCa.open(tmp_path / "ca", "f")
    key = new_key()
    issued = ca.issue_device(read_request(signing_request(key, "cam-1")), "cam-1", "f", 90 * DAY)
    certificate = x509.load_pem_x509_certificate(issued.pem.encode())
    certificate.verify_directly_issued_by(x509.load_pem_x509_certificate(ca.bundle.encode()))
    assert certificate.subject.rfc4514_string() == "O=f,CN=cam-1"
    extension = certificate.extensions.get_extension_for_class
    usage = [ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH]
    assert list(extension(x509.ExtendedKeyUsage).value) == usage
    names = extension(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.UniformResourceIdentifier) == ["shoal:device:cam-1"]
    assert names.get_values_for_type(x509.DNSName) == [DEVICE_HOST], "no host: a server to its peers alone"
    assert not extension(x509.BasicConstraints).value.ca
    assert (issued.key_sha256, int(issued.serial, 16)) == (fingerprint(key), certificate.serial_number)
    assert issued.not_after - issued.not_before == 90 * DAY


def test_a_ca_that_was_brought_must_be_whole(tmp_path: Path) -> None:
    for name in ("one", "two"):
        FleetCa.open(tmp_path / name, name)
    one, two = tmp_path / "one", tmp_path / "two"
    assert FleetCa.open(tmp_path / "none", "f", certificate=one / "ca.pem", key=one / "ca.key").bundle
    with pytest.raises(InvalidError, match="SHOAL_CA_KEY is not the key"):
        FleetCa.open(tmp_path / "none", "f", certificate=one / "ca.pem", key=two / "ca.key")
    with pytest.raises(InvalidError, match="SHOAL_CA_CERT"):
        FleetCa.open(tmp_path / "none", "f", certificate=one / "ca.key", key=one / "ca.key")
    assert not (tmp_path / "none").exists()


def test_each_list_of_revocations_is_later_than_the_last(tmp_path: Path) -> None:
    files = BrokerFiles(Settings(state_dir=tmp_path), FleetCa.open(tmp_path / "ca", "f"))
    files.folder.mkdir()
    now = dt.datetime.now(dt.UTC)
    made = []
    for serials in ([], ["1f"], ["1f", "2e"]):
        assert files.write_revocations([(serial, now) for serial in serials], now)
        assert not files.write_revocations([(serial, now) for serial in serials], now)
        crl = x509.load_pem_x509_crl((files.folder / "crl.pem").read_bytes())
        assert [f"{one.serial_number:x}" for one in crl] == serials
        made.append(crl.last_update_utc)
    assert made == sorted(set(made))
    assert files.write_revocations([("1f", now), ("2e", now)], now + 2 * DAY), "an old one is made anew"


def test_an_identity_is_kept_whole_and_renewed_in_the_last_third(tmp_path: Path) -> None:
    identity = Identity("d", "k", "a" * 64, not_before=0.0, not_after=100.0)
    save_identity(tmp_path / "identity", identity)
    assert load_identity(tmp_path / "identity") == identity
    assert 66.6 < due_at(identity) < 78


def test_a_request_of_a_version_that_there_is_not_is_refused() -> None:
    der = base64.b64decode("".join(signing_request(new_key(), "cam-1").splitlines()[1:-1]))
    other = base64.encodebytes(der.replace(b"\x02\x01\x00", b"\x02\x01\x02", 1)).decode()
    with pytest.raises(InvalidError, match="not a valid CSR version"):
        read_request(f"-----BEGIN CERTIFICATE REQUEST-----\n{other}-----END CERTIFICATE REQUEST-----\n")
