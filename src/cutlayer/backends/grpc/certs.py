"""Certificates of a private authority: one for the server, one for each client, who is known by its name in it."""

from __future__ import annotations

import datetime
import os
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from cutlayer.errors import ConfigError

SERVER_NAME = "cutlayer-server"
"""What every server certificate is made out to, and what clients expect, whatever the server's address is."""


def make_certificates(folder: str | Path, clients: Sequence[str], days: float = 825) -> list[Path]:
    """Make what is missing of an authority, a server and these clients; return the files that were written.

    A folder `server` and a folder for each client hold what that machine needs: ca.crt, own.crt, own.key. The
    authority's key stays in `folder`, which no other machine needs. Certificates are valid for `days`.
    """
    folder = Path(folder)
    for name in clients:
        check_name(name)
    written: list[Path] = []
    authority_file, key_file = folder / "ca.crt", folder / "ca.key"
    if not authority_file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        key = ec.generate_private_key(ec.SECP256R1())
        authority = _certificate("cutlayer private authority", key, None, key, [], 3650)
        written += [_write(key_file, _key_bytes(key)), _write(authority_file, _bytes(authority))]
    key = serialization.load_pem_private_key(key_file.read_bytes(), None)
    authority = x509.load_pem_x509_certificate(authority_file.read_bytes())
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigError(f"{key_file}: expected an elliptic-curve key, made by this command")
    for name in ("server", *clients):
        place = folder / name
        if (place / "own.crt").exists():
            continue
        place.mkdir(exist_ok=True)
        own = ec.generate_private_key(ec.SECP256R1())
        # The server's may also ask for its own health; it is no client's, as clients are known by their names.
        usage = [ExtendedKeyUsageOID.CLIENT_AUTH] + [ExtendedKeyUsageOID.SERVER_AUTH] * (name == "server")
        certificate = _certificate(SERVER_NAME if name == "server" else name, own, authority, key, usage, days)
        written += [
            _write(place / "ca.crt", _bytes(authority)),
            _write(place / "own.key", _key_bytes(own)),
            _write(place / "own.crt", _bytes(certificate)),
        ]
    return written


def check_name(name: str) -> None:
    """Raise ConfigError for a name that a client cannot have."""
    plain = name.isprintable() and not set(name) & set("/\\,")
    if not name or name in ("server", SERVER_NAME, ".", "..") or not plain or len(name) > 64:
        raise ConfigError(
            f"expected a client's name of 1 to 64 printable characters without '/' and ',', not 'server', got {name!r}"
        )


def read_certificates(folder: str | Path) -> tuple[bytes, bytes, bytes]:
    """Authority, own certificate and own key of a machine's folder, as PEM; ConfigError if missing or expired."""
    files = [Path(folder) / name for name in ("ca.crt", "own.crt", "own.key")]
    missing = [str(file) for file in files if not file.is_file()]
    if missing:
        raise ConfigError(f"missing: {', '.join(missing)}; make them with `cutlayer certs`, and give --tls the folder")
    authority, certificate, key = (file.read_bytes() for file in files)
    own, authorities = _parsed(files[1], certificate), _parsed(files[0], authority)
    require_key(files[2], key, own[0])
    # More than one make a chain, which the other side follows.
    if len(own) == 1 and not any(_issued(own[0], one) for one in authorities):
        raise ConfigError(
            f"{files[1]} is not of the authority in {files[0]}; copy a machine's folder as a whole from where "
            "`cutlayer certs` made it"
        )
    until = own[0].not_valid_after_utc
    if until < datetime.datetime.now(datetime.UTC):
        raise ConfigError(
            f"{files[1]}: expired on {until:%Y-%m-%d}; remove its folder where the authority's key is, run "
            "`cutlayer certs` there and copy the new one here"
        )
    return authority, certificate, key


def _parsed(file: Path, content: bytes) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(content)
    except ValueError as error:
        raise ConfigError(f"{file}: expected a certificate (PEM), got something else: {error}") from None


def require_key(file: Path, content: bytes, certificate: x509.Certificate) -> None:
    """Raise ConfigError for what is no private key, or not the certificate's."""
    try:
        key = serialization.load_pem_private_key(content, None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ConfigError(f"{file}: expected a private key (PEM), got something else: {error}") from None
    if key.public_key() != certificate.public_key():
        raise ConfigError(f"{file}: is not the key of the certificate beside it; copy a machine's folder as a whole")


def days_left(folder: str | Path) -> float:
    """Days until this machine's certificate expires."""
    (own, *_) = _parsed(file := Path(folder) / "own.crt", file.read_bytes())
    return (own.not_valid_after_utc - datetime.datetime.now(datetime.UTC)).total_seconds() / 86400


def _issued(own: x509.Certificate, authority: x509.Certificate) -> bool:
    try:
        own.verify_directly_issued_by(authority)
    except (InvalidSignature, ValueError, TypeError):
        return False
    return True


def common_name(certificate: bytes) -> str:
    """The name that a certificate (PEM) is made out to. Raises ConfigError if there is not one."""
    names = x509.load_pem_x509_certificate(certificate).subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    if len(names) != 1:
        raise ConfigError(f"expected a certificate that is made out to one name, got {len(names)}")
    return str(names[0].value)


def _certificate(
    name: str,
    key: ec.EllipticCurvePrivateKey,
    authority: x509.Certificate | None,
    authority_key: ec.EllipticCurvePrivateKey,
    usage: list[x509.ObjectIdentifier],
    days: float,
) -> x509.Certificate:
    now = datetime.datetime.now(datetime.UTC)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject if authority is None else authority.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        # A day of grace for clocks that are behind.
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=authority is None, path_length=None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key()), critical=False)
    )
    if usage:
        builder = builder.add_extension(x509.ExtendedKeyUsage(usage), critical=True)
    if ExtendedKeyUsageOID.SERVER_AUTH in usage:
        builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
    return builder.sign(authority_key, hashes.SHA256())


def _bytes(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _key_bytes(key: ec.EllipticCurvePrivateKey) -> bytes:
    plain = serialization.NoEncryption()
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain)


def _write(file: Path, content: bytes) -> Path:
    """Write a file as a whole. A key is readable for its owner alone, whatever the one before it was."""
    new = file.with_name(f"{file.name}.new")
    new.unlink(missing_ok=True)
    # Nobody else may read a key, not even between its creation and a chmod.
    handle = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if file.suffix == ".key" else 0o644)
    with os.fdopen(handle, "wb") as out:
        out.write(content)
        out.flush()
        os.fsync(out.fileno())
    new.replace(file)
    return file
