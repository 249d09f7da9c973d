"""A client's process: it does what the server's plan says, and does not share its half, its optimizer and its data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import nn
from torch.utils.data import DataLoader, Dataset

from cutlayer.backends.client_data import ClientData
from cutlayer.backends.grpc.policy import OWN_HALF, Policy
from cutlayer.backends.grpc.renewal import warn_of_expiry
from cutlayer.backends.grpc.rpc import KEEPALIVE, check_address
from cutlayer.backends.grpc.session import Endpoint, own_name
from cutlayer.backends.grpc.stop import Stop
from cutlayer.errors import ConfigError
from cutlayer.files import locked
from cutlayer.method import Method, Training, require_choices
from cutlayer.runs.taking_part import Membership, TakingPart


def join(
    address: str,
    half: nn.Module,
    train: Dataset | DataLoader,
    test: Dataset | DataLoader | None = None,
    *,
    folder: str | Path,
    name: str | None = None,
    tls: str | Path | None = None,
    insecure_plaintext: bool = False,
    method: Method = Method(),
    training: Training = Training(),
    policy: Policy = OWN_HALF,
    on_epoch: Callable[[str, int], None] | None = None,
    give_up_after: float | None = None,
    keepalive: float = KEEPALIVE,
    stop: Stop | None = None,
) -> nn.Module:
    """Take part in a run that another process serves; return the trained client half.

    Args:
        address: HOST:PORT of the server. The connection is made from here, and made again whenever it is lost.
        half: from a batch of inputs to the activations at the cut; trained in place.
        train, test: as in `fit`; their inputs never leave this process.
        folder: for this client's checkpoints and, at the end, client.safetensors. If it took part in the run
            before, it goes on.
        name: this client's name; by default the one in its certificate, without TLS "client".
        tls: this machine's folder of certificates (`cutlayer certs`).
        insecure_plaintext: allow addresses beyond this machine without TLS.
        method, training: as the server's; what matters to both is compared when they meet.
        policy: what this client is willing to do and to reveal, whatever the server asks.
        on_epoch: called after each epoch of this client, with its exchange ("A" or "B") and its number.
        give_up_after: seconds without a server after which this raises TimeoutError; None tries for ever.
        keepalive: seconds within which a connection whose other end has vanished without a word is given up.
        stop: lets another thread, or signals, end this early.

    Raises:
        ConfigError: arguments, folder or address do not fit; another process is at work in the folder.
        RefusedError: the server does not take this client, or something it sent, or asks for what the policy does not
            allow; the message says why.
        Stopped: this was asked to stop; the same call goes on.
    """
    check_address(address, tls, insecure_plaintext)
    require_choices(method, training)
    if tls is not None:
        certified = own_name(tls)
        if name not in (None, certified):
            raise ConfigError(f"name: the certificate in {tls} is made out to {certified!r}, not to {name!r}")
        name = certified
        warn_of_expiry(tls)
    data, server = ClientData(train, test), Endpoint(address, tls, keepalive)
    with locked(Path(folder), "this client's folder"):
        member = Membership(name or "client", half, data, Path(folder), method, training, policy)
        client = TakingPart(member, on_epoch, stop)
        while not client.take_part(server, give_up_after):
            pass
    return half
