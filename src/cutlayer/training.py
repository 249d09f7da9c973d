"""The loop. What happens to a batch, in order, and where to read it:

    batch                        data.Feed
    client half, encode          client.Client.forward
    wire                         wire.inproc.InProcessWire
    decode, server half, loss,   server.Server.receive
    backward, update, encode
    wire
    decode, backward, update     client.Client.backward

In a B epoch the way ends at the server, which keeps what it got; a C epoch is the server's alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.data import DataLoader, Dataset

from cutlayer.client import Client
from cutlayer.data import Feed
from cutlayer.errors import ConfigError
from cutlayer.formats.base import numel
from cutlayer.history import Baseline, EpochRecord, History
from cutlayer.ledger import Ledger
from cutlayer.method import Method, Task, Training
from cutlayer.run import Run
from cutlayer.schedule import Exchange, State
from cutlayer.server import ClientInfo, Server
from cutlayer.split import Halves
from cutlayer.wire.inproc import InProcessWire


def train_epoch(client: Client, server: Server, wire: InProcessWire, microbatches: int = 1) -> float:
    """Train for the epoch that the server's schedule names; return its mean training loss."""
    server.begin()
    if server.exchange is Exchange.NONE:
        server.replay()
    else:
        client.begin(wire.deliver(server.plan(client.number)))
        for step, batch in enumerate(client.batches()):
            replies = [wire.send(frame) for frame in client.forward_parts(step, batch, microbatches)]
            for reply in replies:
                if reply is not None:
                    client.backward(reply)
    return server.finish()


def evaluate(client: Client, server: Server, wire: InProcessWire, *, changed: bool) -> dict[str, float]:
    """Test loss and metrics. The client sends its test activations only where they have `changed` since last time."""
    if changed:
        for frame in client.evaluation_frames():
            wire.send(frame)
    return server.evaluate()


@dataclass(frozen=True, eq=False)
class Result:
    """What `fit` returns: the history, and the uncut network with the trained weights."""

    history: History
    model: nn.Module


def fit(
    halves: Halves,
    train: Dataset | DataLoader,
    test: Dataset | DataLoader | None = None,
    *,
    method: Method = Method(),
    training: Training = Training(),
    task: Task = Task(),
    run: str | Path | None = None,
    resume: bool = False,
    on_epoch: Callable[[EpochRecord], None] | None = None,
    config: dict[str, Any] | None = None,
) -> Result:
    """Train a network that is cut in two, one client and the server in this process, over real frames.

    Args:
        halves: from `split`, or two modules of your own. They are trained in place.
        train: map-style data set of (input, label), or a loader of one.
        test: the same for evaluation, which goes over the wire, too, and is counted apart.
        method: when to communicate and in which number format.
        training: epochs, optimizers, seed, device.
        task: loss and metrics; cross-entropy and accuracy by default.
        run: folder to write config, metrics, checkpoints and the merged model to.
        resume: go on from the newest checkpoint in `run`; with the same arguments as before, the result is the same,
            bit for bit, as without the interruption.
        on_epoch: called after each epoch with its record.
        config: what to write to config.json in place of a description of the arguments.

    Raises:
        ConfigError: the arguments contradict each other or the data.
        DivergedError: loss, activations or gradients became infinite or NaN; the last checkpoint stays.
        StoreFullError: the activations of all samples exceed the replay store's budget.
    """
    ledger = Ledger()
    feed = Feed(
        train,
        batch_size=training.batch_size,
        seed=training.seed,
        shuffle=training.shuffle,
        drop_last=training.drop_last,
        augment=training.augment,
    )
    test_feed = None
    if test is not None:
        test_feed = Feed(test, batch_size=training.batch_size, seed=training.seed, shuffle=False)
    client = Client(0, halves.client, feed, test_feed, method, training, ledger)
    info = ClientInfo(len(feed), len(test_feed or ()), max(f.batch_size for f in (feed, test_feed or feed)))
    server = Server(halves.server, [info], client.cut_shape, method, training, task, ledger)
    wire = InProcessWire(server.receive, ledger)

    modules = {
        "client": (client.half, client.optimizer.optimizer),
        "server": (server.half, server.optimizer.optimizer),
    }
    stores = {"store": server.store, "test_store": server.test_store}
    baseline = _baseline(client)
    config = config if config is not None else _describe(method, training, task)
    folder = Run(run) if run is not None else None
    records: list[EpochRecord] = []
    changed = True  # the client half, since the test activations that the server keeps
    if folder is not None and resume and folder.exists():
        _same_config(folder, config)
        found = folder.checkpoints.load(modules, stores)
        epochs, state = found if found is not None else (0, None)
        records = folder.rewind(epochs)
        if state is not None:
            server.state = State(Exchange(state["exchange"]), state["epoch"], state["reference"])
            changed = state["changed"]
    elif folder is not None:
        folder.create(config, baseline)

    for epoch in range(len(records), training.epochs):
        exchange = server.exchange
        loss = train_epoch(client, server, wire, training.microbatches)
        samples, last = server.samples, epoch + 1 == training.epochs
        changed = changed or exchange is not Exchange.NONE
        scores = {}
        if test_feed is not None and (last or (epoch + 1) % training.evaluate_every == 0):
            scores = evaluate(client, server, wire, changed=changed)
            changed = False
        records.append(EpochRecord(epoch, exchange.value, loss, samples, scores, **ledger.take()))
        if folder is not None:
            # Metrics first: a kill between the two leaves a line too many, which the next start drops.
            folder.append(records[-1])
            if last or (epoch + 1) % training.checkpoint_every == 0:
                folder.checkpoints.save(epoch + 1, modules, stores, {**vars(server.state), "changed": changed})
        if on_epoch is not None:
            on_epoch(records[-1])
    result = Result(History(records, baseline), halves.merged())
    if folder is not None:
        folder.save_model(result.model)
    return result


def _baseline(client: Client) -> Baseline:
    """Costs of an epoch of plain split learning in 32 bits with the client's data and batches."""
    sizes = client.train.batch_sizes()
    flops = sum(sum(client.flops(size)) for size in sizes)
    return Baseline(sum(sizes) * numel(client.cut_shape) * 4 * 2, flops)


def _describe(method: Method, training: Training, task: Task) -> dict[str, Any]:
    """The arguments of a run that was begun from Python, for its reader and to compare with when it resumes."""
    task_names = {"loss": getattr(task.loss, "__name__", repr(task.loss)), "metrics": sorted(task.metrics)}
    values = {f"method.{k}": repr(v) for k, v in vars(method).items()}
    values |= {f"training.{k}": repr(v) for k, v in vars(training).items()}
    return values | {f"task.{k}": repr(v) for k, v in task_names.items()}


def _same_config(folder: Run, config: dict[str, Any]) -> None:
    before = folder.read_config()["config"]
    if before != config:
        different = [key for key in {**before, **config} if before.get(key) != config.get(key)]
        listed = "; ".join(f"{key}: was {before.get(key)}, now {config.get(key)}" for key in different)
        raise ConfigError(
            f"{folder.folder} was begun with another config and cannot be resumed with this one: {listed}"
        )
