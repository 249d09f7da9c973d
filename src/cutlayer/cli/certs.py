"""The command `cutlayer certs`: certificates of a private authority, made in one place or requested from a device."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from cutlayer.backends.grpc.certs import days_left, make_certificates
from cutlayer.backends.grpc.requests import install, make_request, sign
from cutlayer.errors import ConfigError

STEPS = ("request", "sign", "install", "show")


def _positive(days: float) -> float:
    if not days > 0:
        raise ConfigError(f"days: expected more than 0, got {days:g}")
    return days


@dataclasses.dataclass(frozen=True)
class CertsArguments:
    """Make a private authority, a server certificate and one for each client; what is there already stays.

    Keys that never travel: on the device `cutlayer certs request`, where the authority is `cutlayer certs sign`, and on
    the device `cutlayer certs install`. `cutlayer certs show` says how long certificates are valid.
    """

    folder: tyro.conf.Positional[str]
    """Folder to write to. Copy its folder `server` to the server and each client's folder to that client."""
    client: tuple[str, ...] = ("client",)
    """Names of the clients."""
    days: float = 825
    """Days that the certificates are valid."""


@dataclasses.dataclass(frozen=True)
class RequestArguments:
    """On a device: make a key, which stays there, and a request for a certificate."""

    folder: tyro.conf.Positional[str]
    """This machine's folder of certificates; own.csr in it is the request."""
    name: str
    """This client's name in the run; "server" for the server."""


@dataclasses.dataclass(frozen=True)
class SignArguments:
    """Where the authority is: make a certificate from a request."""

    folder: tyro.conf.Positional[str]
    """The authority's folder, with ca.key; it is made if it is not there."""
    request: tyro.conf.Positional[str]
    """The request, own.csr. Be sure that it is from whom it says."""
    name: str
    """The name that you expect in it, and sign."""
    out: str = "signed.pem"
    """File for the certificate and the authority's, to copy to the device."""
    days: float = 825
    """Days that the certificate is valid."""


@dataclasses.dataclass(frozen=True)
class InstallArguments:
    """On the device: put a signed certificate beside its key. The one before stays in force until then."""

    folder: tyro.conf.Positional[str]
    """This machine's folder of certificates."""
    signed: tyro.conf.Positional[str]
    """What the authority made of the request."""


@dataclasses.dataclass(frozen=True)
class ShowArguments:
    """Say for how many days certificates are valid."""

    folders: tyro.conf.Positional[Annotated[tuple[str, ...], tyro.conf.arg(metavar="FOLDER ...")]]
    """Machines' folders of certificates."""


def certs(arguments: Sequence[str], console: Console) -> None:
    """Make certificates for a server and its clients."""
    step = arguments[0] if arguments and arguments[0] in STEPS else ""
    rest = arguments[1:] if step else arguments
    prog = f"cutlayer certs {step}".strip()
    if step == "request":
        request = tyro.cli(RequestArguments, prog=prog, args=rest)
        written = [make_request(request.folder, request.name)]
    elif step == "sign":
        order = tyro.cli(SignArguments, prog=prog, args=rest)
        written = [sign(order.folder, order.request, order.name, order.out, _positive(order.days))]
    elif step == "install":
        new = tyro.cli(InstallArguments, prog=prog, args=rest)
        written = install(new.folder, new.signed)
    elif step == "show":
        for folder in tyro.cli(ShowArguments, prog=prog, args=rest).folders:
            if not (Path(folder) / "own.crt").is_file():
                raise ConfigError(f"{folder}: expected a folder of certificates, with own.crt")
            console.print(f"{folder}: {days_left(folder):.0f} days", soft_wrap=True)
        return
    else:
        chosen = tyro.cli(CertsArguments, prog=prog, args=rest)
        written = make_certificates(chosen.folder, chosen.client, _positive(chosen.days))
        if not written:
            text = f"all there already in {chosen.folder}; to renew one, remove its folder"
            console.print(text)
    for file in written:
        console.print(f"wrote {file}", soft_wrap=True)
