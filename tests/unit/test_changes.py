"""What the server refuses, keeps and replays if clients send changes."""

import pytest
import torch
from torch import nn

from cutlayer import Always, ConfigError, Method, Periodic, RefusedError, StoreFullError, StoreOptions, Task, Training
from cutlayer.codecs import Encoded, encode_exactly, get_float_codec
from cutlayer.memory.delta import REFERENCE
from cutlayer.records.ledger import Ledger
from cutlayer.training.checks import ClientSummary
from cutlayer.training.job import Job
from cutlayer.training.server import Server
from cutlayer.wire.frames import Frame, pack, read, unpack
from cutlayer.wire.messages import Plan, Step
from tests.helpers.server import receive

CUT, BATCH, SAMPLES = 6, 4, 10


def make_server(spec: str = "delta0.1>fp16") -> Server:
    torch.manual_seed(0)
    method = Method(Periodic(period=3), spec)
    job = Job(nn.Linear(CUT, 3), (CUT,), method, Training(), Task())
    server = Server(job, [ClientSummary(SAMPLES, 4, BATCH)], Ledger())
    server.begin()
    return server


def frame(
    message: Step | None = None,
    sent: list[int] | None = None,
    changes: torch.Tensor | None = None,
    ids: list[int] | None = None,
    **tensors: Encoded,
) -> bytes:
    sent = [1] * BATCH if sent is None else sent
    changes = torch.ones(sent.count(1), CUT) if changes is None else changes
    content = {
        "ids": encode_exactly(torch.tensor(ids or list(range(len(sent))))),
        "labels": encode_exactly(torch.arange(len(sent)) % 3),
        "activations": get_float_codec("fp16").encode(changes),
        "sent": encode_exactly(torch.tensor(sent)),
    }
    return pack(Frame(message or Step(0, 0, 0), {**content, **tensors}))


def kept(server: Server, ids: list[int]) -> torch.Tensor:
    return REFERENCE.decode(server.replayed.store.encoded(torch.tensor(ids)))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (frame(sent=[1, 0, 1, 1]), r"client 0: sent: expected changes of samples \[1\], which have no reference"),
        (frame(sent=[1, 2, 1, 0]), r"client 0: sent: expected 0 or 1 for each sample, got \[1, 2, 1, 0\]"),
        (frame(sent=[1] * 5), "client 0: batch size: expected 1 to 4, got 5"),
        (frame(changes=torch.ones(3, CUT)), "client 0: changes: expected 4, got 3"),
        (frame(changes=torch.full((4, CUT), float("nan"))), "activations: expected finite values"),
        (frame(sent=[1, 1, 1, 300]), "client 0: sent: expected a byte for each sample, got u16"),
        (frame(more=encode_exactly(torch.ones(4).long())), "client 0: fields: expected"),
        (frame(Step(0, 0, 0, anew=True), sent=[0, 0, 0, 0]), r"expected changes of samples \[0, 1, 2, 3\]"),
    ],
)
def test_a_frame_that_does_not_fit_is_refused_and_changes_nothing(data: bytes, message: str) -> None:
    server = make_server()
    with pytest.raises(RefusedError, match=message):
        receive(server, data)
    assert server.samples == len(server.replayed.store) == 0
    assert receive(server, frame()) is not None  # and the run goes on


def test_changes_add_up_from_a_to_b_and_are_replayed_in_c() -> None:
    server = make_server()
    empty = unpack(server.plan(0).data).message
    assert isinstance(empty, Plan)
    receive(server, frame())
    server.finish()
    server.begin()
    told = unpack(server.plan(0).data).message
    assert told == Plan(0, 1, "B", references=server.replayed.store.digest(0, SAMPLES))
    assert told.references != empty.references
    assert receive(server, frame(Step(0, 1, 0), sent=[0, 1, 0, 0], ids=[3, 2, 1, 0])) is None
    assert torch.equal(kept(server, [0, 1, 2, 3]), torch.ones(4, CUT) * torch.tensor([[1.0], [1.0], [2.0], [1.0]]))
    server.finish()
    server.begin()
    server.learner.replay()
    assert server.samples == BATCH


def test_a_batch_of_which_nothing_is_sent_is_trained_on() -> None:
    server = make_server()
    receive(server, frame())
    before = kept(server, [0, 1, 2, 3])
    nothing = frame(Step(0, 0, 1), sent=[0, 0, 0, 0])
    assert dict(read(nothing).sizes())["activations"] == BATCH  # a byte for each sample
    assert receive(server, nothing) is not None
    assert torch.equal(kept(server, [0, 1, 2, 3]), before)
    assert server.samples == 2 * BATCH


def test_a_client_that_begins_anew_is_followed_and_only_in_the_first_step() -> None:
    server = make_server()
    receive(server, frame())
    receive(server, frame(Step(0, 0, 1), ids=[4, 5, 6, 7]))
    with pytest.raises(RefusedError, match="anew: expected in the first step and with delta"):
        receive(server, frame(Step(0, 0, 2, anew=True)))
    server.finish()
    server.begin()
    again = frame(Step(0, 1, 0, anew=True), changes=torch.full((4, CUT), 3.0))
    receive(server, again)
    assert torch.equal(kept(server, [0, 1, 2, 3]), torch.full((4, CUT), 3.0))
    assert len(server.replayed.store) == BATCH
    plain = make_server("fp16")
    with pytest.raises(RefusedError, match="anew: expected"):
        receive(plain, frame(Step(0, 0, 0, anew=True)))
    with pytest.raises(RefusedError, match="fields: expected"):
        receive(plain, frame())


def test_references_saturate_and_stay_finite() -> None:
    server = make_server()
    for step in range(3):
        receive(server, frame(Step(0, 0, step), changes=torch.full((4, CUT), 6e4)))
    assert torch.equal(kept(server, [0]), torch.full((1, CUT), 65504.0))


def test_the_servers_memory_has_a_budget_whatever_the_schedule() -> None:
    options = StoreOptions("memory", memory_budget_mib=0)
    for spec, gradients, name in (("delta>mxfp4", "fp32", "replay store"), ("fp32", "ef>mxfp4", "error feedback")):
        method = Method(Always(), spec, gradients, store=options)
        job = Job(nn.Linear(CUT, 3), (CUT,), method, Training(), Task())
        with pytest.raises(StoreFullError, match=f"{name} of 10 samples"):
            Server(job, [ClientSummary(SAMPLES, 0, BATCH)], Ledger())


def test_a_c_epoch_needs_references() -> None:
    with pytest.raises(ConfigError, match="a C epoch needs stored activations"):
        make_server().learner.replay()
