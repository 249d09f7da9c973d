"""Certificates of a private authority: one for the server, one for each client, who is known by its name in it."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from cutlayer.durable import replace
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
    if not (folder / "ca.crt").exists():
        written += [folder / "ca.key", folder / "ca.crt"]
    authority, key = authority_of(folder)
    for name in ("server", *clients):
        place = folder / name
        if (place / "own.crt").exists():
            continue
        place.mkdir(exist_ok=True)
        own = ec.generate_private_key(ec.SECP256R1())
        certificate = certificate_for(name, own.public_key(), authority, key, days)
        written += [
            write(place / "ca.crt", _bytes(authority)),
            write(place / "own.key", key_bytes(own)),
            write(place / "own.crt", _bytes(certificate)),
        ]
    return written


def authority_of(folder: Path) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    """The authority in a folder and its key; made if it is not there."""
    authority_file, key_file = folder / "ca.crt", folder / "ca.key"
    if not authority_file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        made = ec.generate_private_key(ec.SECP256R1())
        itself = _certificate("cutlayer private authority", made.public_key(), None, made, [], 3650)
        write(key_file, key_bytes(made))
        write(authority_file, _bytes(itself))
    (authority,) = parsed(authority_file, authority_file.read_bytes())[:1]
    require_key(key_file, content := key_file.read_bytes(), authority)
    key = serialization.load_pem_private_key(content, None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigError(f"{key_file}: expected an elliptic-curve key, made by this command")
    return authority, key


def certificate_for(
    name: str,
    key: ec.EllipticCurvePublicKey,
    authority: x509.Certificate,
    authority_key: ec.EllipticCurvePrivateKey,
    days: float,
) -> x509.Certificate:
    """A certificate of a client, or of the server by the name "server", for this key."""
    # The server's may also ask for its own health; it is no client's, as clients are known by their names.
    usage = [ExtendedKeyUsageOID.CLIENT_AUTH] + [ExtendedKeyUsageOID.SERVER_AUTH] * (name == "server")
    return _certificate(SERVER_NAME if name == "server" else name, key, authority, authority_key, usage, days)


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
    own, authorities = parsed(files[1], certificate), parsed(files[0], authority)
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


def parsed(file: Path, content: bytes) -> list[x509.Certificate]:
    """The certificates in a file. Raises ConfigError for anything else."""
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
    (own, *_) = parsed(file := Path(folder) / "own.crt", file.read_bytes())
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
    key: ec.EllipticCurvePublicKey,
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
        .public_key(key)
        .serial_number(x509.random_serial_number())
        # A day of grace for clocks that are behind.
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=authority is None, path_length=None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key()), critical=False)
    )
    if usage:
        builder = builder.add_extension(x509.ExtendedKeyUsage(usage), critical=True)
    if ExtendedKeyUsageOID.SERVER_AUTH in usage:
        builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
    return builder.sign(authority_key, hashes.SHA256())


def _bytes(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def key_bytes(key: ec.EllipticCurvePrivateKey) -> bytes:
    """A private key as PEM."""
    plain = serialization.NoEncryption()
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain)


def write(file: Path, content: bytes) -> Path:
    """Write a file as a whole. A key is readable for its owner alone, whatever the one before it was."""
    replace(file, content, private=file.suffix == ".key")
    return file
