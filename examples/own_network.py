"""cutlayer on a network, data, loss and metric of one's own: a small transformer that counts.

python examples/own_network.py [--epochs 20]
"""

import argparse

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import cutlayer


class Network(nn.Module):
    """Nine bits in; out, as a logit, whether ones outnumber zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(2, 32)
        self.first = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
        self.second = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
        self.head = nn.Linear(9 * 32, 1)

    def forward(self, bits: Tensor) -> Tensor:
        x = self.embed(bits)
        x = self.second(self.first(x))
        return self.head(x.flatten(1))


def majority(count: int, seed: int) -> TensorDataset:
    bits = torch.randint(0, 2, (count, 9), generator=torch.Generator().manual_seed(seed))
    return TensorDataset(bits, (bits.sum(1, keepdim=True) > 4).float())


def main(epochs: int) -> float | None:
    torch.manual_seed(0)
    halves = cutlayer.split(Network(), "first")  # a wrong name lists the possible ones
    adam = cutlayer.Optimizer(name="adam", lr=0.002, weight_decay=0.0, schedule="constant")
    result = cutlayer.fit(
        halves,
        DataLoader(majority(2048, seed=1), batch_size=64, shuffle=True),
        majority(512, seed=2),
        method=cutlayer.Method.of(cutlayer.Drop(threshold=0.05), codec="fp8"),
        training=cutlayer.Training(epochs=epochs, batch_size=64, client=adam, server=adam),
        task=cutlayer.Task(
            loss=nn.functional.binary_cross_entropy_with_logits,
            metrics={"accuracy": lambda outputs, labels: ((outputs > 0) == (labels > 0)).float().mean()},
        ),
        on_epoch=lambda record: print(
            f"{record.epoch + 1:3} {record.exchange} {record.loss:.4f} {record.test['accuracy']:.3f}"
        ),
    )
    history = result.history
    print(f"{history.exchanges}: {history.traffic_reduction:.1f}x less traffic")
    print(f"merged network: {type(result.model).__name__}")
    return history.test("accuracy")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=20)
    main(parser.parse_args().epochs)
