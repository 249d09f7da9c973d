"""What the server refuses, names, and does not apply."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from cutlayer import ConfigError, Method, Periodic, RefusedError, Task, Training
from cutlayer.codecs import Encoded, encode_exactly, get_float_codec
from cutlayer.records.ledger import Ledger
from cutlayer.training.checks import ClientSummary
from cutlayer.training.job import Job
from cutlayer.training.server import Server
from cutlayer.wire.frames import Frame, pack, unpack
from cutlayer.wire.messages import Evaluate, Message, Plan, Step, Update
from tests.helpers.server import receive

CUT, BATCH, SAMPLES = 6, 4, 10
F16 = get_float_codec("fp16").encode(torch.zeros(4))


def make_server(codec: str = "fp32") -> Server:
    torch.manual_seed(0)
    half = nn.Sequential(nn.Linear(CUT, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
    method = Method(Periodic(period=3), codec, codec)
    job = Job(half, (CUT,), method, Training(epochs=9), Task())
    server = Server(job, [ClientSummary(SAMPLES, 4, BATCH)], Ledger())
    server.begin()
    return server


def frame(
    message: Message | None = None,
    values: torch.Tensor | None = None,
    codec: str = "fp32",
    ids: list[int] | None = None,
    labels: torch.Tensor | None = None,
    tensors: Callable[[dict[str, Encoded]], dict[str, Encoded]] = lambda tensors: tensors,
) -> bytes:
    if values is None:
        values = torch.randn(BATCH, CUT, generator=torch.Generator().manual_seed(1))
    content = {
        "ids": encode_exactly(torch.tensor(ids if ids is not None else list(range(len(values))))),
        "labels": encode_exactly(labels if labels is not None else torch.arange(len(values)) % 3),
        "activations": get_float_codec(codec).encode(values),
    }
    return pack(Frame(message or Step(0, 0, 0), tensors(content)))


def nan(count: int = BATCH) -> torch.Tensor:
    values = torch.zeros(count, CUT)
    values[1, 2] = float("nan")
    return values


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (frame(Step(1, 0, 0)), "client: expected a number from 0 to 0, got 1"),
        (frame(Step(-1, 0, 0)), "client: expected a number from 0 to 0, got -1"),
        (frame(Step(999, 0, -1)), "client: expected a number from 0 to 0, got 999"),
        (frame(Step(0, 0, -1)), "client 0: step: expected 0, got -1"),
        (frame(Step(0, 3, 0)), r"client 0: epoch: expected epoch 0 \(A\), got Step\(client=0, epoch=3, step=0"),
        (frame(Step(0, 0, 2)), "client 0: step: expected 0, got 2"),
        (frame(codec="fp16"), "client 0: codec: expected fp32, got fp16"),
        (frame(values=torch.zeros(BATCH, CUT + 1)), r"client 0: shape: expected \[6\], got \[7\]"),
        (frame(values=torch.zeros(BATCH, 2, 3)), r"client 0: shape: expected \[6\], got \[2, 3\]"),
        (frame(values=torch.zeros(BATCH + 1, CUT)), "client 0: batch size: expected 1 to 4, got 5"),
        (
            frame(values=torch.zeros(0, CUT), labels=torch.zeros(0).long()),
            "client 0: batch size: expected 1 to 4, got 0",
        ),
        (frame(ids=[0, 1, 2]), "client 0: ids: expected 4 ids, got 3"),
        (frame(ids=[0, 1, 2, SAMPLES]), "client 0: ids: expected 0 to 9, got 10$"),
        (frame(ids=[0, 1, 2, -1]), "client 0: ids: expected 0 to 9, got -1$"),
        (frame(labels=torch.zeros(3).long()), "client 0: labels: expected 4 labels, got 3"),
        (
            frame(ids=[4, 5, 6, 7], labels=torch.tensor([1.0, float("nan"), 0.0, float("inf")])),
            "client 0: labels: expected finite values, got infinities or NaN in samples 5, 7$",
        ),
        (
            frame(ids=[4, 5, 6, 7], labels=torch.tensor([0, 3, 2, -1])),
            r"client 0: labels: expected classes from 0 to 2, one a sample, got 3 \(sample 5\), -1 \(sample 7\)$",
        ),
        (frame(labels=torch.tensor([0, 1, 2, -1])), "client 0: labels: expected classes from 0 to 2"),
        (frame(labels=torch.zeros(4, 1).long()), "client 0: labels: expected classes from 0 to 2"),
        (
            frame(labels=torch.ones(4)),
            r"or their probabilities \(floats \[3\]\), got floats \[\]. If this is regression",
        ),
        (frame(labels=torch.ones(4, 2)), r"or their probabilities \(floats \[3\]\), got floats \[2\]"),
        (frame(values=nan()), "activations: expected finite values"),
        (
            frame(tensors=lambda t: {**t, "ids": t["activations"]}),
            "client 0: codec of ids: expected .*, got fp32",
        ),
        (frame(tensors=lambda t: {**t, "labels": F16}), "client 0: codec of labels: expected .*, got fp16"),
        (frame(tensors=lambda t: {"activations": t["activations"]}), "client 0: fields: expected"),
        (frame(tensors=lambda t: {**t, "weights": t["ids"]}), "client 0: fields: expected"),
        (frame(Update(0, 0, 0)), "expected a step, got Update"),
        (pack(Frame(Plan(0, 0, "A"))), "expected a step, got Plan"),
        (frame(Evaluate(0, 999, 0)), r"client 0: expected Evaluate\(client=0, epoch=-1, step=0\), got"),
        (frame(Evaluate(0, -1, -5)), r"client 0: expected Evaluate\(client=0, epoch=-1, step=0\), got"),
        (frame(Evaluate(0, -1, 0), ids=[0, 1, 2, 4]), r"client 0: ids: expected 0 to 3, got"),
        (frame(Evaluate(7, -1, 0)), r"client 0: expected Evaluate\(client=0, epoch=-1, step=0\), got"),
        (frame(Evaluate(0, -1, 0), values=nan()), "activations: expected finite values"),
        (b"", "expected at least 17 bytes, got 0"),
    ],
)
def test_a_frame_that_does_not_fit_is_refused_and_changes_nothing(data: bytes, message: str) -> None:
    server = make_server()
    before = copy.deepcopy(server.half.state_dict())
    with pytest.raises(RefusedError, match=message):
        receive(server, data)
    assert all(torch.equal(before[name], value) for name, value in server.half.state_dict().items())
    assert server.samples == len(server.replayed.store) == len(server.evaluation.store) == 0
    assert receive(server, frame()) is not None  # and the run goes on


def test_class_probabilities_are_labels_too() -> None:
    assert receive(make_server(), frame(labels=torch.full((4, 3), 1 / 3))) is not None


def test_a_step_that_comes_twice_is_applied_once() -> None:
    """A link delivers each frame once; should one come again all the same, it is refused."""
    once, twice = make_server(), make_server()
    first, second = frame(Step(0, 0, 0)), frame(Step(0, 0, 1), values=torch.ones(3, CUT))
    for data in (first, second):
        assert receive(once, data) == receive(twice, data)
        with pytest.raises(RefusedError, match="client 0: step: expected"):
            receive(twice, data)
    assert once.finish() == twice.finish()
    for name, value in once.half.state_dict().items():
        assert torch.equal(value, twice.half.state_dict()[name])
    twice.begin()
    with pytest.raises(RefusedError, match="epoch: expected epoch 1"):
        receive(twice, second)


def test_in_b_the_server_keeps_what_it_got_and_in_c_it_takes_nothing() -> None:
    server = make_server("fp8_e4m3")
    assert unpack(receive(server, frame(codec="fp8_e4m3")) or b"").message == Update(0, 0, 0)
    assert len(server.replayed.store) == 0
    server.finish()
    server.begin()
    assert unpack(server.plan(0).data).message == Plan(0, 1, "B")
    values = torch.randn(BATCH, CUT)
    assert receive(server, frame(Step(0, 1, 0), values, "fp8_e4m3", ids=[9, 0, 3, 5])) is None
    kept, labels = server.replayed.store.get(torch.tensor([0, 9]))
    codec = get_float_codec("fp8_e4m3")
    assert torch.equal(codec.decode(kept), codec.decode(codec.encode(values))[[1, 0]])
    assert labels.tolist() == [1, 0]
    server.finish()
    server.begin()
    with pytest.raises(RefusedError, match=r"expected epoch 2 \(C\)"):
        receive(server, frame(Step(0, 2, 0), codec="fp8_e4m3"))
    before = copy.deepcopy(server.half.state_dict())
    server.learner.replay()
    assert server.samples == BATCH
    assert not torch.equal(before["0.weight"], server.half.state_dict()["0.weight"])


def test_labels_of_another_kind_than_before_are_refused_whole() -> None:
    clients, method = [ClientSummary(SAMPLES, 0, BATCH)], Method(Periodic(period=3))
    task = Task(nn.functional.mse_loss, {})
    server = Server(Job(nn.Linear(CUT, 2), (CUT,), method, Training(), task), clients, Ledger())
    server.begin()
    receive(server, frame(labels=torch.zeros(4, 2)))
    server.finish()
    server.begin()
    kept = torch.randn(BATCH, CUT)
    receive(server, frame(Step(0, 1, 0), kept, labels=torch.ones(4, 2)))
    for labels in (torch.zeros(4, 3), torch.zeros(4, 2).long()):
        with pytest.raises(RefusedError, match=r"labels: expected floats \[2\], got"):
            receive(server, frame(Step(0, 1, 1), labels=labels))
    encoded, labels = server.replayed.store.get(torch.arange(4))
    assert torch.equal(get_float_codec("fp32").decode(encoded), kept)
    assert torch.equal(labels, torch.ones(4, 2))


def test_a_loss_that_fails_says_on_what() -> None:
    task = Task(lambda outputs, labels: outputs.no_such_thing, {})
    server = Server(
        Job(nn.Linear(CUT, 3), (CUT,), Method(), Training(), task), [ClientSummary(SAMPLES, 4, BATCH)], Ledger()
    )
    server.begin()
    with pytest.raises(RefusedError, match=r"the loss failed on outputs \[4, 3\] and labels torch.int64 \[4\]: .*no_s"):
        receive(server, frame())


def test_a_schedule_that_skips_b_is_told_so() -> None:
    server = make_server()
    with pytest.raises(ConfigError, match="epoch 0 trained on no sample"):
        server.finish()
    with pytest.raises(ConfigError, match="no B epoch came before it"):
        server.learner.replay()
