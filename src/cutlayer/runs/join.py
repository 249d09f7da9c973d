"""A client's process: it does what the server's plan says, as far as the client's policy allows.

Its data and its optimizer stay here. So does its half, unless several clients share one, as in SplitFed, and the policy
lets it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import nn
from torch.utils.data import DataLoader, Dataset

from cutlayer.backends.client_data import ClientData
from cutlayer.backends.grpc.calls import leave
from cutlayer.backends.grpc.policy import OWN_HALF, Policy
from cutlayer.backends.grpc.renewal import warn_of_expiry
from cutlayer.backends.grpc.rpc import Endpoint
from cutlayer.backends.grpc.session import own_name
from cutlayer.errors import ConfigError
from cutlayer.files import locked
from cutlayer.method import Method, Training, require_choices
from cutlayer.runs.remote_client import Membership, RemoteClient
from cutlayer.stop_request import Stop

__all__ = ["Endpoint", "Policy", "Stop", "join", "leave"]


def join(
    server: str | Endpoint,
    half: nn.Module,
    train: Dataset | DataLoader,
    test: Dataset | DataLoader | None = None,
    *,
    folder: str | Path,
    name: str | None = None,
    method: Method = Method(),
    training: Training = Training(),
    policy: Policy = OWN_HALF,
    on_epoch: Callable[[str, int], None] | None = None,
    give_up_after: float | None = None,
    stop: Stop | None = None,
) -> nn.Module:
    """Take part in a run that another process serves; return the trained client half.

    Args:
        server: HOST:PORT on this machine, or an `Endpoint`, with certificates for one elsewhere. The connection is made
            from here, and made again whenever it is lost.
        half: from a batch of inputs to the activations at the cut; trained in place.
        train, test: as in `fit`; their inputs never leave this process.
        folder: for this client's checkpoints and, at the end, client.safetensors. If it took part in the run
            before, it goes on.
        name: this client's name; by default the one in its certificate, without TLS "client".
        method, training: as the server's; what matters to both is compared when they meet.
        policy: what this client is willing to do and to reveal, whatever the server asks.
        on_epoch: called after each epoch of this client, with its exchange ("A" or "B") and its number.
        give_up_after: seconds without a server after which this raises TimeoutError; None tries for ever. The time in
            which a server holds this client before it lets it in is not counted.
        stop: lets another thread, or signals, end this early.

    Raises:
        ConfigError: arguments, folder or address do not fit; another process is at work in the folder.
        RefusedError: the server does not take this client, or something it sent, or asks for what the policy does not
            allow; the message says why.
        Stopped: this was asked to stop; the same call goes on.
    """
    endpoint = Endpoint.of(server)
    require_choices(method, training)
    if endpoint.tls is not None:
        certified = own_name(endpoint.tls)
        if name not in (None, certified):
            raise ConfigError(f"name: the certificate in {endpoint.tls} is made out to {certified!r}, not to {name!r}")
        name = certified
        warn_of_expiry(endpoint.tls)
    data = ClientData(train, test)
    with locked(Path(folder), "this client's folder"):
        member = Membership(name or "client", half, data, Path(folder), method, training, policy)
        client = RemoteClient(member, on_epoch, stop)
        while not client.take_part(endpoint, give_up_after):
            pass
    return half
