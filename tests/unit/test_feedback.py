"""Error feedback: what a codec loses of a sample's gradients comes later."""

from pathlib import Path

import pytest
import torch

from cutlayer import StoreFullError, StoreOptions
from cutlayer.codecs import get_float_codec
from cutlayer.memory.error_feedback import RESIDUAL, ErrorFeedback
from cutlayer.records import state_dicts

SAMPLES, VALUES = 6, 30


def feedback(spec: str, budget: int = 100) -> ErrorFeedback:
    return ErrorFeedback(get_float_codec(spec), SAMPLES, (VALUES,), StoreOptions("memory", budget))


@pytest.mark.parametrize("spec", ["topk0.1>fp16", "mxfp4:stochastic", "int4+zstd"])
def test_nothing_is_lost_for_good(spec: str) -> None:
    gradients = 1e-5 * torch.randn(20, SAMPLES, VALUES, generator=torch.Generator().manual_seed(1))
    memory, ids = feedback(spec), torch.randperm(SAMPLES)
    total = torch.zeros(SAMPLES, VALUES)
    for step, gradient in enumerate(gradients):
        total += memory.codec.decode(memory.encode(ids, gradient, step))
    missing = gradients.sum(0) - total
    kept = RESIDUAL.decode(memory.store.encoded(ids))
    assert torch.allclose(kept, missing, atol=1e-6)  # what bfloat16 rounds off in 20 steps
    assert missing.norm() < 0.5 * gradients.sum(0).norm()


def test_residuals_are_of_their_sample_and_survive_a_checkpoint(tmp_path: Path) -> None:
    memory, other = feedback("topk0.1>fp16"), feedback("topk0.1>fp16")
    gradients = torch.randn(4, VALUES)
    memory.encode(torch.tensor([0, 1, 2, 3]), gradients)
    facts = state_dicts.write(memory.store.state_dict(), tmp_path / "residuals")
    other.store.load_state_dict(state_dicts.read(tmp_path / "residuals", facts))
    ids = torch.tensor([3, 5])
    encoded = [kept.encode(ids, torch.ones(2, VALUES)) for kept in (memory, other)]
    assert torch.equal(encoded[0].rows, encoded[1].rows)
    fresh = feedback("topk0.1>fp16").encode(ids, torch.ones(2, VALUES))
    assert torch.equal(encoded[0].rows[1], fresh.rows[1])
    assert not torch.equal(encoded[0].rows[0], fresh.rows[0])


def test_values_that_are_not_finite_are_sent_and_not_remembered() -> None:
    memory, ids = feedback("fp16"), torch.arange(2)
    broken = torch.ones(2, VALUES)
    broken[0, 0] = float("nan")
    assert memory.codec.decode(memory.encode(ids, broken)).isnan().any()
    assert memory.codec.decode(memory.encode(ids, torch.ones(2, VALUES))).isfinite().all()


def test_the_memory_has_a_budget() -> None:
    with pytest.raises(StoreFullError, match=r"the store of error feedback of 6 samples \[30\] in bf16 takes"):
        feedback("fp16", budget=0)
