"""A served run under attack: a real server with TLS, honest clients, and one whose device is in the wrong hands."""

from __future__ import annotations

import copy
import functools
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import grpc
import msgspec
import torch
from torch import nn
from torch.utils.data import TensorDataset

from cutlayer import Halves, Method, Periodic, Result, fit
from cutlayer.backends.client_data import ClientData
from cutlayer.backends.grpc.certs import make_certificates
from cutlayer.backends.grpc.limits import ClientLimits
from cutlayer.backends.grpc.rpc import SERVICE, Endpoint
from cutlayer.backends.grpc.session import Session, open_channel
from cutlayer.codecs import encode_exactly, get_codec
from cutlayer.records.history import EpochRecord
from cutlayer.runs.join import join
from cutlayer.runs.remote_client import Membership, RemoteClient
from cutlayer.runs.serve import Callbacks, Listening, Served, Waits, serve
from cutlayer.stop_request import Stop, Stopped
from cutlayer.wire.frames import Frame, pack, read, unpack
from cutlayer.wire.messages import Finished, Hello, Plan, Refusal, Step
from tests.helpers.small import data, equal, training

CUT = (8,)
NAMES = ("alice", "bob", "mallory")
SAMPLES = dict(zip(NAMES, (24, 16, 8), strict=True))
METHOD = Method.of(Periodic(period=3), "fp8")  # A B C A
PATIENCE = 2.0


def halves() -> Halves:
    """Small ones without a squashing function, so that what is huge stays so."""
    torch.manual_seed(0)
    client = nn.Sequential(nn.Linear(6, 8), nn.Tanh())
    return Halves(client, nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)))


@functools.cache
def reference(names: tuple[str, ...], epochs: int = 4, all_names: tuple[str, ...] = NAMES) -> Result:
    """The run of these clients in one process, undisturbed."""
    sets = shares(all_names)
    return fit(halves(), [sets[name] for name in names], method=METHOD, training=training(epochs))


def shares(names: tuple[str, ...]) -> dict[str, TensorDataset]:
    """The clients' data, in unequal parts."""
    sizes = (24, 16, 8) if len(names) == 3 else (*(16,) * (len(names) - 1), 8)
    return dict(zip(names, data(sizes), strict=True))


def certificates(folder: Path, names: tuple[str, ...] = NAMES) -> Path:
    make_certificates(folder, [*names, "eve"])
    return folder


class Attacked:
    """A server in a thread.

    Args:
        patience: None waits for all clients, to the bits of all three; otherwise mallory may be left out.
        all_names: whose the data are, if clients are to be admitted later.
        waits: in place of what goes with this patience.
        listening: what is chosen of a `Listening` beside the address and the certificates.
    """

    def __init__(
        self,
        folder: Path,
        tls: Path,
        *,
        patience: float | None = PATIENCE,
        epochs: int = 4,
        names: tuple[str, ...] = NAMES,
        all_names: tuple[str, ...] = (),
        method: Method = METHOD,
        network: Halves | None = None,
        keep_checkpoints: int = 2,
        waits: Waits | None = None,
        limits: ClientLimits = ClientLimits(),
        **listening: Any,
    ) -> None:
        self.folder, self.tls, self.epochs, self.names = folder, tls, epochs, names
        self.method, network = method, network or halves()
        self.training = training(epochs, keep_checkpoints=keep_checkpoints)
        self.half, server_half = (copy.deepcopy(half) for half in (network.client, network.server))
        self.data = shares(all_names or names)
        self.stop, self.served, self.error = Stop(), None, None
        self.port, self._listening = 0, threading.Event()
        self.joined: dict[str, torch.nn.Module] = {}
        self.errors: dict[str, BaseException] = {}
        self._stop_at, self._waits, self._client_stop = -1, [], Stop()
        self._listener: Callable[[str], None] = lambda exchange: None
        self._hellos: dict[str, Hello] = {}
        self._threads: list[threading.Thread] = []
        waits = waits or Waits(5.0, patience, linger=5.0 if patience is None else 0.3)

        def run() -> None:
            try:
                self.served = serve(
                    server_half,
                    CUT,
                    listen=Listening("127.0.0.1:0", tls / "server", **listening),
                    run=folder / "server",
                    clients=names,
                    client_half=self.half,
                    method=self.method,
                    training=self.training,
                    waits=waits,
                    limits=limits,
                    callbacks=Callbacks(self._on_epoch, self._listens, self._waits.append),
                    stop=self.stop,
                )
            except Stopped:
                pass
            except BaseException as error:
                self.error = error
            finally:
                self._listening.set()

        self.thread = threading.Thread(target=run, daemon=True)
        self.thread.start()
        assert self._listening.wait(30)
        assert self.error is None, self.error

    def _listens(self, port: int) -> None:
        self.port = port
        self._listening.set()

    def __enter__(self) -> Attacked:
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop.requested = self._client_stop.requested = True
        for thread in (self.thread, *self._threads):
            thread.join(30)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    # --- honest clients ---

    def begin(self, *names: str) -> None:
        """These take part, each in a thread."""
        for name in names:
            self._threads.append(threading.Thread(target=self._take_part, args=(name,), daemon=True))
            self._threads[-1].start()

    def stop_after(self, epochs: int) -> None:
        """Have the server stop once so many epochs are done."""
        self._stop_at = epochs

    def watch(self, listener: Callable[[str], None]) -> None:
        """Call this after each epoch."""
        self._listener = listener

    def _on_epoch(self, record: EpochRecord) -> None:
        self._listener(record.exchange)
        self.stop.requested = self.stop.requested or record.epoch + 1 == self._stop_at

    def wait_until_there(self, name: str) -> None:
        """Wait until the server has let this client in, as it logs."""
        deadline = time.monotonic() + 30
        while not self._waits or name in self._waits[-1]:
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def _take_part(self, name: str) -> None:
        try:
            self.joined[name] = self.join(name)
        except Stopped:
            pass
        except BaseException as error:
            self.errors[name] = error

    def join(
        self, name: str, half: torch.nn.Module | None = None, folder: Path | None = None, **more: object
    ) -> torch.nn.Module:
        more.setdefault("stop", self._client_stop)
        return join(
            Endpoint(self.address, self.tls / name),
            half or copy.deepcopy(self.half),
            self.data[name],
            folder=folder or self.folder / name,
            method=self.method,
            training=self.training,
            **more,
        )

    def end(self) -> Served:
        """The run ends, for the server and for the honest."""
        for thread in (self.thread, *self._threads):
            thread.join(60 if self.epochs < 10 else 3600)
            assert not thread.is_alive(), "the run does not end"
        assert self.error is None, self.error
        assert not self.errors, self.errors
        assert self.served is not None
        return self.served

    def finish(self, *names: str) -> Served:
        """And in the bits of the undisturbed run of these clients."""
        served = self.end()
        expected = reference(names, self.epochs, self.names).halves
        for half in self.joined.values():
            assert equal(half, expected.client)
        assert equal(served.half, expected.server)
        away = [number for number, name in enumerate(self.names) if name not in names]
        assert all(record.absent == away for record in served.history.epochs if record.exchange != "C")
        return served

    # --- the attacker ---

    def hello(self, name: str = "mallory", **changes: object) -> Hello:
        """What the honest device would say."""
        folder = self.folder / f"{name}-copy"
        if name not in self._hellos:
            chosen = ClientData(self.data[name]), folder, self.method, self.training
            self._hellos[name] = RemoteClient(Membership(name, copy.deepcopy(self.half), *chosen))._hello()
        return msgspec.structs.replace(self._hellos[name], **changes)

    def session(self, name: str = "mallory", **changes: object) -> Session:
        """A session that has begun."""
        session = Session(Endpoint(self.address, self.tls / name), self.hello(name, **changes), 1 << 20)
        assert session.wait_welcome(30) is not None
        return session

    def channel(self, name: str = "mallory") -> grpc.Channel:
        return open_channel(self.address, self.tls / name)

    @staticmethod
    def exchange(channel: grpc.Channel) -> grpc.StreamStreamMultiCallable:
        return channel.stream_stream(f"/{SERVICE}/Exchange")

    def say(self, *messages: bytes, name: str = "mallory", timeout: float = 20) -> list[bytes]:
        """Open a stream, send these messages and wait for what comes until the server ends it."""
        with self.channel(name) as channel:
            return list(self.exchange(channel)(iter(messages), timeout=timeout))

    def refusal(self, hello: Hello, name: str = "mallory") -> str:
        """Why this Hello is refused."""
        message = unpack(self.say(pack(Frame(hello)), name=name)[-1]).message
        assert isinstance(message, Refusal), message
        return message.reason


def plan_of(session: Session) -> Plan | None:
    """The next plan that comes; None if the run ends."""
    while not isinstance(message := read(session.link.receive(30)).message, Plan):
        if isinstance(message, Finished):
            return None
    return message


def step(plan: Plan, number: int = 0, **changes: object) -> bytes:
    """A good step of mallory's, but for what is changed in its tensors."""
    count = SAMPLES["mallory"]
    tensors = {
        "ids": encode_exactly(torch.arange(count)),
        "labels": encode_exactly(torch.zeros(count, dtype=torch.int64)),
        "activations": get_codec("fp8_e4m3").encode(torch.zeros(count, *CUT)),
    }
    return pack(Frame(Step(plan.client, plan.epoch, number), {**tensors, **changes}))


def refused(session: Session, frames: Iterable[bytes]) -> list[str]:
    """What the server says to these frames, each of which it refuses."""
    reasons = []
    for frame in frames:
        session.link.send(frame)
        while not isinstance(message := read(session.link.receive(30)).message, Refusal):
            pass
        reasons.append(message.reason)
    return reasons


def memory_mib() -> float:
    """Resident memory of this process at its peak since the last call of `forget_peak`."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def forget_peak() -> float:
    """Begin to measure the peak anew; the resident memory now, in MiB."""
    Path("/proc/self/clear_refs").write_text("5")
    return memory_mib()
