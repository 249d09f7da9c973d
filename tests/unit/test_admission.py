"""A server's admission: what changes while a client waits to be let in counts when it is."""

import threading
import time
from pathlib import Path

import pytest

from cutlayer import Method, Training
from cutlayer.backends.grpc.admission import Admission
from cutlayer.backends.grpc.claims import Claims, Outline
from cutlayer.backends.grpc.clients import GrpcClients
from cutlayer.backends.grpc.limits import ClientLimits
from cutlayer.backends.grpc.name_files import Revocations
from cutlayer.backends.grpc.operation import Listening, Operation
from cutlayer.backends.grpc.rpc import Endpoint
from cutlayer.backends.grpc.way_back import WayBack
from cutlayer.errors import ConfigError, RefusedError
from cutlayer.records.checkpoint import Checkpoints
from cutlayer.records.noted import gone_back, left_out
from cutlayer.runs.metrics import shown
from cutlayer.wire.messages import Hello, Saved

OUTLINE = Outline(("alice", "bob"), None, (4,), Method(), Training(epochs=1))


def hello(name: str, half: str) -> Hello:
    terms = {**Claims(OUTLINE, ClientLimits()).terms, "client half": half}
    return Hello(
        name=name, run="", checkpoints=(0,), samples=8, test_samples=0, batch_size=4, drop_last=False,
        test_batch_size=0, frozen=False, epoch_samples=8, epoch_steps=2, epoch_flops=1, epoch_forward=1, epoch_bytes=1,
        weights_bytes=1, half_bytes=1, terms=terms,
    )  # fmt: skip


class Asking(threading.Thread):
    """A client that asks to be let in, and what became of it."""

    def __init__(self, admission: Admission, message: Hello) -> None:
        super().__init__(daemon=True)
        self.admission, self.message, self.refusal, self.welcome = admission, message, "", None
        self.start()

    def run(self) -> None:
        try:
            self.welcome, _ = self.admission.admit(self.message)
        except RefusedError as error:
            self.refusal = str(error)


def held(admission: Admission, *messages: Hello) -> list[Asking]:
    """Clients that wait until the server is ready."""
    asking = [Asking(admission, message) for message in messages]
    while len(admission._condition._waiters) < len(asking):  # type: ignore[attr-defined]
        assert all(each.is_alive() for each in asking), [each.refusal for each in asking]
        time.sleep(0.01)
    return asking


@pytest.fixture
def admission(tmp_path: Path) -> Admission:
    limits = ClientLimits()
    way_back = WayBack("run", Checkpoints(tmp_path), limits.goings_back, gone_back(tmp_path))
    return Admission(Claims(OUTLINE, limits), way_back)


def test_who_is_barred_while_it_waits_is_not_let_in(admission: Admission) -> None:
    (alice,) = held(admission, hello("alice", "half"))
    admission.bar("alice", "revoked")
    admission.open([0, 0])
    alice.join(5)
    assert "takes part no more: revoked" in alice.refusal
    assert not admission.hellos


def test_of_two_that_wait_with_different_halves_one_is_let_in(admission: Admission) -> None:
    both = held(admission, hello("alice", "one"), hello("bob", "another"))
    admission.open([0, 0])
    for each in both:
        each.join(5)
    (refused,) = [each for each in both if each.refusal]
    assert "client half: expected" in refused.refusal
    assert len(admission.hellos) == 1


def test_who_is_left_out_stays_out_when_it_is_revoked_no_more(tmp_path: Path) -> None:
    noted, file = left_out(tmp_path), tmp_path / "revoked.txt"
    noted.add("alice", "training diverged")
    file.write_text("alice\nbob\n")
    revoked = Revocations(file)
    operation = Operation(Listening("127.0.0.1:0", revoked=revoked))
    clients = GrpcClients(OUTLINE, operation, Checkpoints(tmp_path), lambda: Saved(0), noted)
    file.write_text("")
    revoked.reread()
    assert clients.admission.barred == {"alice": "training diverged"}


def test_a_port_is_one() -> None:
    for address in ("127.0.0.1:65536", "127.0.0.1:-1", "127.0.0.1:", ":7070", "127.0.0.1"):
        with pytest.raises(ConfigError, match="expected HOST:PORT"):
            Endpoint(address)
        with pytest.raises(ConfigError, match="metrics: expected HOST:PORT"), shown(None, address):  # type: ignore[arg-type]
            pass
