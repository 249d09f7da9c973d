"""The loop. What happens to a batch, in order, and where to read it:

    batch                        feed.Feed
    client half, encode          client.Client.forward
    wire                         wire.inproc.InProcessWire
    checks                       intake.Intake
    decode, server half, loss,   server.Server.receive
    backward, update, encode
    wire
    decode, backward, update     client.Client.backward

In a B epoch the way ends at the server, which keeps what it got; a C epoch is the server's alone.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.data import DataLoader, Dataset

from cutlayer.client import Client
from cutlayer.describe import describe, fingerprint, structure
from cutlayer.errors import ConfigError
from cutlayer.feed import Feed
from cutlayer.formats.base import numel
from cutlayer.history import Baseline, EpochRecord, History
from cutlayer.intake import ClientInfo
from cutlayer.ledger import Ledger
from cutlayer.method import Method, Task, Training
from cutlayer.run import Run
from cutlayer.schedule import Exchange, State
from cutlayer.server import Server
from cutlayer.split import Halves, copied
from cutlayer.wire.inproc import InProcessWire


def train_epoch(client: Client, server: Server, wire: InProcessWire, microbatches: int = 1) -> float:
    """Train for the epoch that the server's schedule names; return its mean training loss."""
    server.begin()
    if server.exchange is Exchange.NONE:
        server.replay()
    else:
        client.begin(wire.deliver(server.plan(client.number)))
        for step, batch in enumerate(client.batches()):
            replies = [wire.send(encode()) for encode in client.forward_parts(step, batch, microbatches)]
            for reply in replies:
                if reply is not None:
                    client.backward(reply)
    return server.finish()


@dataclass(frozen=True, eq=False)
class Result:
    """What `fit` returns: the history, the uncut network with the trained weights in eval mode, and the halves."""

    history: History
    model: nn.Module
    halves: Halves


def fit(
    halves: Halves,
    train: Dataset | DataLoader,
    test: Dataset | DataLoader | None = None,
    *,
    method: Method = Method(),
    training: Training = Training(),
    task: Task = Task(),
    run: str | Path | Run | None = None,
    resume: bool = False,
    on_epoch: Callable[[EpochRecord], None] | None = None,
) -> Result:
    """Train a network that is cut in two, one client and the server in this process, over real frames.

    Args:
        halves: from `split`, or two modules of your own. Copies of them are trained.
        train: map-style data set of (input, label), or a loader of one.
        test: the same for evaluation, which goes over the wire, too, and is counted apart.
        method: when to communicate and in which number format.
        training: epochs, optimizers, seed, device.
        task: loss and metrics; cross-entropy and accuracy by default.
        run: folder to write config, metrics, checkpoints and the merged model to.
        resume: go on from the newest checkpoint in `run`, if there is one; with the same arguments as before, the
            result is the same, bit for bit, as without the interruption.
        on_epoch: called after each epoch with its record.

    Raises:
        ConfigError: the arguments contradict each other, the data, or the run that is to be resumed.
        DivergedError: loss, activations or gradients became infinite or NaN; the last checkpoint stays.
        StoreFullError: the activations of all samples exceed the replay store's budget, which is checked before
            training begins (for labels of one number), or the disk is full.
    """
    if not isinstance(halves, Halves):
        raise ConfigError(
            f"expected Halves, from split(model, layer) or Halves(client, server), got {type(halves).__name__}"
        )
    if resume and run is None:
        raise ConfigError("resume needs the folder of the run")
    halves, ledger = copied(halves), Ledger()
    feed = Feed(
        train,
        batch_size=training.batch_size,
        seed=training.seed,
        shuffle=training.shuffle,
        drop_last=training.drop_last,
        augment=training.augment,
    )
    test_feed = Feed(test, batch_size=feed.batch_size, seed=training.seed, shuffle=False) if test is not None else None
    client = Client(0, halves.client, feed, test_feed, method, training, ledger)
    info = client_info(feed, test_feed)
    server = Server(halves.server, [info], client.cut_shape, method, training, task, ledger)
    wire = InProcessWire(server.receive, ledger)
    baseline = _baseline(client, server)

    modules = {
        "client": (client.half, client.optimizer.optimizer),
        "server": (server.half, server.optimizer.optimizer),
    }
    stores = {"store": server.store, "test_store": server.test_store}
    folder = run if isinstance(run, Run) or run is None else Run(run)
    records: list[EpochRecord] = []
    with folder.locked() if folder is not None else nullcontext():
        if folder is not None:
            chosen = {"method": describe(method), "training": describe(training), "task": describe(task)}
            records, state = folder.open(chosen, _facts(halves, client), baseline, resume, modules, stores)
            if state is not None:
                server.go_back(State.restored(state))
        for epoch in range(len(records), training.epochs):
            exchange, last = server.exchange, epoch + 1 == training.epochs
            loss = train_epoch(client, server, wire, training.microbatches)
            due = test_feed is not None and (last or (epoch + 1) % training.evaluate_every == 0)
            # A C epoch is evaluated on what was sent before it, so the client sends its test activations in time.
            if exchange is not Exchange.NONE and (due or server.exchange is Exchange.NONE):
                for frame in client.evaluation_frames(epoch):
                    wire.send(frame)
            scores = server.evaluate() if due else {}
            records.append(EpochRecord(epoch, exchange.value, loss, server.samples, scores, **ledger.take()))
            if folder is not None:
                # Metrics first: a kill between the two leaves a line too many, which the next start drops.
                folder.append(records[-1])
                if last or (epoch + 1) % training.checkpoint_every == 0:
                    folder.checkpoints.save(epoch + 1, modules, stores, vars(server.state))
            if on_epoch is not None:
                on_epoch(records[-1])
        result = Result(History(records, baseline), halves.merged(), halves)
        if folder is not None:
            folder.save_model(result.model)
    return result


def client_info(train: Feed, test: Feed | None) -> ClientInfo:
    """What the server is told of a client's data."""
    test_samples, test_batch_size = (len(test), test.batch_size) if test is not None else (0, 0)
    return ClientInfo(len(train), test_samples, train.batch_size, train.drop_last, test_batch_size)


def _baseline(client: Client, server: Server) -> Baseline:
    """Costs of an epoch of plain split learning in 32 bits with the client's data and batches."""
    sizes = client.train.batch_sizes()
    for size in set(sizes):  # a size that the server half cannot be trained on is better known now than in the epoch
        server.flops(size, input_gradient=True)
    return Baseline(sum(sizes) * numel(client.cut_shape) * 4 * 2, sum(sum(client.flops(size)) for size in sizes))


def _facts(halves: Halves, client: Client) -> dict[str, Any]:
    """What can be said of halves and data, so that a run is not resumed with others by mistake."""
    first = client.train.first()
    return {
        "client half": structure(halves.client),
        "server half": structure(halves.server),
        "training samples": len(client.train),
        "batches": describe(client.train.batch_sizes()[:1] + client.train.batch_sizes()[-1:]),
        "first samples": fingerprint(first.inputs, first.labels),
        "test samples": len(client.test) if client.test is not None else 0,
    }
