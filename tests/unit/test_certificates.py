"""Certificates whose keys never travel, and folders that are not what they should be."""

import os
import stat
from pathlib import Path

import pytest
from cryptography import x509

from cutlayer import ConfigError
from cutlayer.backends.grpc.certs import common_name, days_left, make_certificates, read_certificates
from cutlayer.backends.grpc.requests import install, make_request, sign
from cutlayer.cli.entry import main


@pytest.fixture
def authority(tmp_path: Path) -> Path:
    make_certificates(tmp_path / "authority", ["alice"])
    return tmp_path / "authority"


def test_a_device_requests_the_authority_signs_the_device_installs(authority: Path, tmp_path: Path) -> None:
    device, signed = tmp_path / "device", tmp_path / "signed.pem"
    request = make_request(device, "dave")
    assert b"PRIVATE KEY" not in request.read_bytes()
    sign(authority, request, "dave", signed, 30)
    assert b"PRIVATE KEY" not in signed.read_bytes()
    install(device, signed)
    assert common_name(read_certificates(device)[1]) == "dave"
    assert 29 < days_left(device) < 31
    assert sorted(file.name for file in device.iterdir()) == ["ca.crt", "own.crt", "own.key"]


def test_a_renewal_replaces_nothing_before_it_is_installed_and_its_key_is_private(authority: Path) -> None:
    device = authority / "alice"
    before = read_certificates(device)
    os.chmod(device / "own.key", 0o644)
    signed = sign(authority, make_request(device, "alice"), "alice", authority / "signed.pem", 30)
    assert read_certificates(device) == before
    install(device, signed)
    assert read_certificates(device)[1] != before[1]
    assert stat.S_IMODE((device / "own.key").stat().st_mode) == 0o600


def test_what_does_not_fit_is_refused_and_changes_nothing(authority: Path, tmp_path: Path) -> None:
    device = tmp_path / "device"
    request = make_request(device, "dave")
    with pytest.raises(ConfigError, match=r"asks for \['dave'\], expected 'alice'"):
        sign(authority, request, "alice", tmp_path / "out", 30)
    with pytest.raises(ConfigError, match="expected a request"):
        sign(authority, authority / "ca.crt", "dave", tmp_path / "out", 30)
    signed = sign(authority, request, "dave", tmp_path / "out", 30)
    make_request(device, "dave")  # another key
    with pytest.raises(ConfigError, match="is not the key of the certificate"):
        install(device, signed)
    assert not (device / "own.crt").exists()
    with pytest.raises(ConfigError, match="client's name"):
        make_request(device, "a\x1bb")


def test_the_server_gets_a_server_certificate(authority: Path, tmp_path: Path) -> None:
    signed = sign(authority, make_request(tmp_path / "s", "server"), "server", tmp_path / "out", 30)
    usage = x509.load_pem_x509_certificates(signed.read_bytes())[0].extensions.get_extension_for_class(
        x509.ExtendedKeyUsage
    )
    assert x509.oid.ExtendedKeyUsageOID.SERVER_AUTH in usage.value


@pytest.mark.parametrize("name", ["own.crt", "own.key", "ca.crt"])
def test_garbage_is_named(name: str, authority: Path) -> None:
    (authority / "alice" / name).write_bytes(b"-----BEGIN nothing")
    with pytest.raises(ConfigError, match=rf"{name}: expected a"):
        read_certificates(authority / "alice")


def test_the_command_says_what_is_wrong_with_its_days(tmp_path: Path, capsys) -> None:
    assert main(["certs", str(tmp_path / "new"), "--days", "-3"]) == 2
    assert "days: expected more than 0, got -3" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
