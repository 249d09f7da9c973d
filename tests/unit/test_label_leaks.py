"""Labels from gradients at the cut: the scores of Li et al., where they leak and where they do not."""

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import nn
from torch.nn.functional import cross_entropy

from cutlayer import ConfigError
from cutlayer.privacy import label_leak
from cutlayer.privacy.labels import by_direction, direction_scores, leak_auc, norm_scores
from tests.helpers.privacy import SHALLOW, trained


def gradients(positive: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Per-sample gradients at the cut of a task whose classes are as rare as said, after some training."""
    draw = torch.Generator().manual_seed(seed)
    labels = (torch.rand(400, generator=draw) < positive).long()
    activations = torch.randn(400, 8, generator=draw) + labels[:, None] * 0.5
    torch.manual_seed(seed)
    server = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
    optimizer = torch.optim.SGD(server.parameters(), 0.1)
    for _ in range(50):
        optimizer.zero_grad()
        cross_entropy(server(activations), labels).backward()
        optimizer.step()
    activations.requires_grad_(True)
    cross_entropy(server(activations), labels, reduction="sum").backward()
    assert activations.grad is not None
    return activations.grad, labels


def test_leak_auc_is_that_of_scikit_learn() -> None:
    scores, positive = torch.randn(50).round(decimals=1), torch.rand(50) < 0.3
    expected = roc_auc_score(positive.numpy(), scores.numpy())
    assert leak_auc(scores, positive) == pytest.approx(expected)
    with pytest.raises(ConfigError, match="samples of both classes"):
        leak_auc(scores, torch.ones(50, dtype=torch.bool))


def test_the_norm_gives_a_rare_class_away_and_a_balanced_one_less() -> None:
    rare, balanced = (leak_auc(norm_scores(g), y == 1) for g, y in (gradients(0.05), gradients(0.5)))
    assert rare > 0.95
    assert abs(balanced - 0.5) < 0.25


def test_the_direction_gives_either_away_given_one_example() -> None:
    for share in (0.05, 0.5):
        found, labels = gradients(share)
        example = found[int((labels == 1).nonzero()[0])]
        assert leak_auc(direction_scores(found, example), labels == 1) > 0.95


def test_gradients_of_one_norm_and_direction_say_nothing() -> None:
    same, labels = torch.ones(40, 3), torch.arange(40) % 2
    assert leak_auc(norm_scores(same), labels == 1) == 0.5
    assert leak_auc(direction_scores(same, same[0]), labels == 1) == 0.5


def test_directions_name_classes() -> None:
    axes, labels = torch.eye(3), torch.tensor([0, 1, 2])
    found = by_direction(torch.tensor([[0.1, 3.0, 0.2], [5.0, 0.0, 1.0]]), axes, labels)
    assert found.tolist() == [1, 0]


def test_digits_follow_from_their_gradients() -> None:
    values = label_leak(trained(SHALLOW))
    assert values["direction accuracy"] > 2.5 * values["guess"]
    assert np.isfinite(list(values.values())).all()
