"""Certificates of which the key never travels: a device requests, the authority signs, the device installs."""

from __future__ import annotations

import datetime
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from cutlayer.backends.grpc.certs import (
    SERVER_NAME,
    authority_of,
    certificate_for,
    check_name,
    key_bytes,
    parsed,
    require_key,
    write,
)
from cutlayer.errors import ConfigError

KEY, NEW_KEY, REQUEST = "own.key", "next.key", "own.csr"


def make_request(folder: str | Path, name: str) -> Path:
    """Make a key and a request in a device's folder; return the request.

    The key of a certificate that is there already stays until `install`, so that a run goes on meanwhile.
    """
    if name != "server":
        check_name(name)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, SERVER_NAME if name == "server" else name)])
    request = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, hashes.SHA256())
    write(folder / NEW_KEY, key_bytes(key))
    return write(folder / REQUEST, request.public_bytes(serialization.Encoding.PEM))


def sign(folder: str | Path, request: str | Path, name: str, out: str | Path, days: float) -> Path:
    """Make a certificate from a request, with the authority in `folder`; return the file for the device.

    Raises ConfigError for what is no request, or one for another name than is expected.
    """
    content = Path(request).read_bytes()
    try:
        asked = x509.load_pem_x509_csr(content)
    except ValueError as error:
        raise ConfigError(f"{request}: expected a request from `cutlayer certs request`: {error}") from None
    names = [str(found.value) for found in asked.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
    if names != [SERVER_NAME if name == "server" else name]:
        raise ConfigError(f"{request}: asks for {names}, expected {name!r}")
    public = asked.public_key()
    if not asked.is_signature_valid or not isinstance(public, ec.EllipticCurvePublicKey):
        raise ConfigError(f"{request}: expected a request that its own elliptic-curve key has signed")
    authority, key = authority_of(Path(folder))
    certificate = certificate_for(name, public, authority, key, days)
    both = certificate.public_bytes(serialization.Encoding.PEM) + authority.public_bytes(serialization.Encoding.PEM)
    return write(Path(out), both)


def install(folder: str | Path, signed: str | Path) -> list[Path]:
    """Put a signed certificate, its authority and the key of the request in force; return the files.

    Raises ConfigError, with nothing changed, for a certificate of another key, or one that has expired.
    """
    folder = Path(folder)
    found = parsed(Path(signed), Path(signed).read_bytes())
    if len(found) != 2:
        raise ConfigError(f"{signed}: expected a certificate and its authority's, got {len(found)} certificates")
    own, authority = found
    if not (folder / NEW_KEY).exists():
        raise ConfigError(f"{folder}: has no {NEW_KEY}; run `cutlayer certs request` here first")
    key = (folder / NEW_KEY).read_bytes()
    require_key(folder / NEW_KEY, key, own)
    if own.not_valid_after_utc < datetime.datetime.now(datetime.UTC):
        raise ConfigError(f"{signed}: expired on {own.not_valid_after_utc:%Y-%m-%d}")
    pem = serialization.Encoding.PEM
    written = [
        write(folder / "ca.crt", authority.public_bytes(pem)),
        write(folder / KEY, key),
        write(folder / "own.crt", own.public_bytes(pem)),
    ]
    for name in (NEW_KEY, REQUEST):
        (folder / name).unlink(missing_ok=True)
    return written
