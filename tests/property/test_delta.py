"""Delta: both sides hold the same bits, whatever the codec; what is skipped, what is added, and how close it comes."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from cutlayer import StoreFullError, StoreOptions
from cutlayer.codecs import Encoded, get_codec, get_float_codec
from cutlayer.memory.delta import REFERENCE, DeltaSender, moved, references
from cutlayer.memory.store import ReplayStore
from cutlayer.wire.frames import Frame, pack, unpack
from cutlayer.wire.messages import Step

SAMPLES = 7
SPECS = [
    "fp32",
    "bf16+zstd",
    "fp8_e4m3:channel",
    "hfp8_e4m3:stochastic",
    "mxfp4:stochastic+zstd",
    "mxfp6_e2m3",
    "nvfp4+zstd",
    "int4",
    "topk0.1>fp16",
    "randtopk0.3,0.5>mxfp4+zstd",
]
values = st.floats(-(2.0**20), 2.0**20, width=32) | st.sampled_from([0.0, -0.0, 1.0, 1e-30, 65504.0, 3.0e38])


class Receiver:
    """The server's side, as far as it knows of references."""

    def __init__(self, capacity: int = SAMPLES) -> None:
        self.store = ReplayStore(capacity)

    def take(self, ids: torch.Tensor, sent: torch.Tensor, encoded: Encoded) -> torch.Tensor:
        """What the server trains on, after a way over the wire."""
        frame = unpack(pack(Frame(Step(0, 0, 0), {"activations": encoded})))
        changes = get_codec(encoded.codec).decode(frame.tensors["activations"])
        after = moved(references(self.store, ids, changes), sent, changes)
        self.store.put(ids, after, torch.zeros(len(ids)))
        return REFERENCE.decode(after)


def sender(spec: str, tolerance: float, shape: tuple[int, ...], samples: int = SAMPLES) -> DeltaSender:
    return DeltaSender(get_float_codec(spec), tolerance, samples, shape, StoreOptions())


@pytest.mark.parametrize("spec", SPECS)
@given(data=st.data(), tolerance=st.sampled_from([0.0, 0.1, 0.9]), seed=st.integers(0, 2**63))
@settings(max_examples=25)
def test_both_sides_have_the_same_bits(spec: str, data: st.DataObject, tolerance: float, seed: int) -> None:
    shape = data.draw(hnp.array_shapes(min_dims=0, max_dims=3, min_side=1, max_side=5))
    client, server = sender(spec, tolerance, shape), Receiver()
    for _ in range(data.draw(st.integers(1, 4))):
        ids = torch.tensor(data.draw(st.lists(st.integers(0, SAMPLES - 1), min_size=1, max_size=SAMPLES)))
        batch = torch.from_numpy(data.draw(hnp.arrays(np.float32, (len(ids), *shape), elements=values)))
        sent, encoded = client.encode(ids, batch, seed)
        assert len(encoded) == int(sent.sum())
        trained = server.take(ids, sent, encoded)
        assert trained.isfinite().all()
        assert torch.equal(REFERENCE.decode(client.store.encoded(ids)), REFERENCE.decode(server.store.encoded(ids)))
        assert client.store.digest(0, SAMPLES) == server.store.digest(0, SAMPLES)
        assert client.agree(server.store.digest(0, SAMPLES))


@given(
    first=hnp.arrays(np.float32, (SAMPLES, 40), elements=st.integers(-25600, 25600).map(lambda n: n / 256)),
    change=hnp.arrays(np.float32, (SAMPLES, 40), elements=st.integers(-2560, 2560).map(lambda n: n / 256)),
    tolerance=st.sampled_from([0.0, 0.05, 0.5]),
)
@settings(max_examples=60)
def test_what_moved_less_than_the_tolerance_is_not_sent(first, change, tolerance: float) -> None:
    client, server, ids = sender("fp16", tolerance, (40,)), Receiver(), torch.arange(SAMPLES)
    sent, encoded = client.encode(ids, torch.from_numpy(first))
    assert sent.all()  # no sample has a reference yet
    before = server.take(ids, sent, encoded)
    now = torch.from_numpy(first + change)
    sent, encoded = client.encode(ids, now)
    after = server.take(ids, sent, encoded)
    distance, norm = (now - before).double().norm(dim=1), now.double().norm(dim=1)
    limit = tolerance * norm
    clear = (distance - limit).abs() > 1e-4 * (distance + limit)
    assert torch.equal(sent[clear], (distance > limit)[clear])
    assert torch.equal(after[~sent], before[~sent])
    assert ((after - now).double().norm(dim=1) <= torch.maximum(1.001 * limit, 2e-3 * (distance + norm) + 1e-4)).all()


def test_references_close_in_on_activations_that_settle() -> None:
    batch, ids = torch.randn(SAMPLES, 64, generator=torch.Generator().manual_seed(0)), torch.arange(SAMPLES)
    for spec, factor in (("mxfp4", 0.2), ("int4", 0.2), ("topk0.25>fp16", 0.9), ("fp8_e4m3", 0.05)):
        client, server = sender(spec, 0.0, (64,)), Receiver()
        errors = []
        for _ in range(5):
            trained = server.take(ids, *client.encode(ids, batch))
            errors.append(float((trained - batch).norm() / batch.norm()))
        floor = 1e-3  # of float16, which the references are in
        assert all(b <= max(factor * a, floor) for a, b in itertools.pairwise(errors)), (spec, errors)


def test_a_difference_is_seen_and_repaired_by_sending_all() -> None:
    client, server, ids = sender("mxfp4", 0.5, (8,)), Receiver(), torch.arange(SAMPLES)
    batch = torch.randn(SAMPLES, 8)
    server.take(ids, *client.encode(ids, batch))
    assert client.agree(server.store.digest(0, SAMPLES))
    known = REFERENCE.decode(client.store.encoded(ids))
    assert not client.encode(ids, known)[0].any()
    server.store.put(ids[2:3], REFERENCE.encode(known[2:3] + 1), torch.zeros(1))
    assert not client.agree(server.store.digest(0, SAMPLES))
    server.store.clear(0, SAMPLES)
    sent, encoded = client.encode(ids, batch)
    assert sent.all()
    server.take(ids, sent, encoded)
    assert client.agree(server.store.digest(0, SAMPLES))


def test_the_digest_covers_the_clients_own_samples_alone() -> None:
    store, rows = ReplayStore(10), REFERENCE.encode(torch.randn(2, 3))
    empty = store.digest(0, 5)
    store.put(torch.tensor([7, 8]), rows)
    assert store.digest(0, 5) == empty
    assert store.digest(5, 10) != ReplayStore(5).digest(0, 5)
    store.clear(5, 10)
    assert store.digest(5, 10) == ReplayStore(5).digest(0, 5)


def test_the_clients_memory_has_a_budget() -> None:
    with pytest.raises(StoreFullError, match=r"store of the client's references of 7 samples \[300\] in fp16 takes"):
        DeltaSender(get_float_codec("mxfp4"), 0.0, SAMPLES, (300,), StoreOptions("memory", memory_budget_mib=0))
