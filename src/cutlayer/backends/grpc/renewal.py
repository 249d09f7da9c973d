"""A server's certificates, read again when their files change, so that they are renewed without an end of the run."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import grpc

from cutlayer.backends.grpc.certs import days_left, read_certificates
from cutlayer.errors import ConfigError

log = logging.getLogger("cutlayer.wire")

WARN_DAYS = 30.0


def server_credentials(tls: str | Path) -> grpc.ServerCredentials:
    """Credentials from a server's folder of certificates. New connections get those that are there at the time."""
    folder = _Folder(Path(tls))
    fetch: Any = folder.changed  # None for no change, which gRPC's types do not know
    return grpc.dynamic_ssl_server_credentials(folder.read(), fetch, require_client_authentication=True)


def warn_of_expiry(tls: str | Path) -> None:
    """Log if this machine's certificate expires soon."""
    if (days := days_left(tls)) < WARN_DAYS:
        log.warning("the certificate in %s expires in %.0f days; renew it (docs/two-machines.md)", tls, days)


class _Folder:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._seen = self._stamp()

    def read(self) -> grpc.ServerCertificateConfiguration:
        authority, certificate, key = read_certificates(self.folder)
        warn_of_expiry(self.folder)
        return grpc.ssl_server_certificate_configuration([(key, certificate)], authority)

    def changed(self) -> grpc.ServerCertificateConfiguration | None:
        """For each connection: new certificates, or None to go on with those that gRPC has."""
        stamp = self._stamp()
        if stamp == self._seen:
            return None
        try:
            configuration = self.read()
        except (ConfigError, OSError) as error:  # in the middle of being replaced, or wrong: the old ones still hold
            log.warning("new certificates in %s are not used: %s", self.folder, error)
            return None
        self._seen = stamp
        log.warning("certificates in %s were renewed", self.folder)
        return configuration

    def _stamp(self) -> list[tuple[int, int]]:
        files = [self.folder / name for name in ("ca.crt", "own.crt", "own.key")]
        return [(file.stat().st_mtime_ns, file.stat().st_ino) for file in files if file.exists()]
