"""The method as a loop written out by hand: one network in two halves, three states, 8-bit transfers.

    python examples/by_hand.py [--epochs 20]

This is what `cutlayer.fit` does, without frames, checkpoints and a ledger: read it first.
"""

import argparse

import torch
from torch.nn.functional import cross_entropy

import cutlayer
from cutlayer.codecs import FLOAT_CODECS
from cutlayer.data.batches import Batches
from cutlayer.data.datasets import digits
from cutlayer.memory.store import ReplayStore
from cutlayer.models.networks import make_model
from cutlayer.schedule import Exchange


def main(epochs: int) -> float:
    torch.manual_seed(0)
    train, test = digits()
    halves = cutlayer.split(make_model("cnn", (1, 8, 8), train.mean, train.std), "layer3")
    client, server = halves.client, halves.server
    client_optimizer = torch.optim.SGD(client.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    server_optimizer = torch.optim.SGD(server.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    activations_8bit, gradients_8bit = FLOAT_CODECS["fp8_e4m3"], FLOAT_CODECS["fp8_e5m2"]
    feed, store = Batches(train, batch_size=64), ReplayStore(len(train))
    schedule = cutlayer.Drop(threshold=0.05)

    def server_step(activations: torch.Tensor, labels: torch.Tensor) -> float:
        loss = cross_entropy(server(activations), labels)
        server_optimizer.zero_grad()
        loss.backward()
        server_optimizer.step()
        return loss.item() * len(labels)

    state, sent = schedule.start(), 0
    for epoch in range(epochs):
        total = 0.0
        if state.exchange is Exchange.NONE:  # C: the server alone, on what it keeps
            for encoded, labels in store.batches(64, torch.Generator().manual_seed(epoch)):
                total += server_step(activations_8bit.decode(encoded), labels)
        else:
            learns = state.exchange is Exchange.BOTH
            for batch in feed.epoch(epoch):
                with torch.set_grad_enabled(learns):
                    activations = client(batch.inputs)
                encoded = activations_8bit.encode(activations)  # up
                sent += encoded.nbytes
                received = activations_8bit.decode(encoded).requires_grad_(learns)
                total += server_step(received, batch.labels)
                if learns:  # A: the gradients come back
                    encoded = gradients_8bit.encode(received.grad)  # down
                    sent += encoded.nbytes
                    client_optimizer.zero_grad()
                    activations.backward(gradients_8bit.decode(encoded))
                    client_optimizer.step()
                else:  # B: nothing comes back, and the server keeps what it got
                    store.put(batch.ids, encoded, batch.labels)
        print(f"epoch {epoch + 1:2}  {state.exchange.value}  loss {total / len(train):.4f}  {sent / 1e6:.2f} MB so far")
        state = schedule.next(state, total / len(train))

    with torch.no_grad():
        outputs = halves.merged().eval()(test.inputs)
    return (outputs.argmax(1) == test.labels).float().mean().item()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=20)
    print(f"test accuracy {main(parser.parse_args().epochs):.4f}")
