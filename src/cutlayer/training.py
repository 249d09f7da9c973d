"""The loop. What happens to a batch, in order, and where to read it:

    batch                        feed.Feed
    client half, encode          client.Client.forward
    wire                         wire.inproc, or wire.rpc between machines
    checks                       intake.Intake
    decode                       server.Server.take
    server half, loss, backward,
    update, encode               server.Server.train
    wire
    decode, backward, update     client.Client.backward

In a B epoch the way ends at the server, which keeps what it got; a C epoch is the server's alone. With several clients
`modes` says whose batch comes when.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from cutlayer.client import Client
from cutlayer.describe import describe, fingerprint, structure
from cutlayer.errors import ConfigError
from cutlayer.feed import Feed
from cutlayer.fleet import Fleet
from cutlayer.formats.base import numel
from cutlayer.history import Baseline, EpochRecord, History
from cutlayer.intake import ClientInfo
from cutlayer.ledger import Ledger
from cutlayer.method import Method, Task, Training
from cutlayer.parties import Absent, Party, Peer, Present, evaluate
from cutlayer.pool import Pool
from cutlayer.run import Run
from cutlayer.schedule import Exchange
from cutlayer.server import Server
from cutlayer.split import Halves, copied
from cutlayer.wire.inproc import InProcessPeer

Data = Dataset | DataLoader


def train_epoch(server: Server, peers: Sequence[Peer]) -> float:
    """Train for the epoch that the server's schedule names, with the clients that are there; return its mean loss."""
    server.begin()
    if server.exchange is Exchange.NONE and server.halves is None and not server.own:
        server.replay()
    else:
        server.mode.train(server, parties_of(server, peers))
    return server.finish()


def parties_of(server: Server, peers: Sequence[Peer]) -> list[Party]:
    """Who takes part in an epoch, by number: the clients that are there, and the store for those that are not."""
    there = {peer.number: peer for peer in peers}
    parties: list[Party] = []
    for client in range(len(server.clients)):
        resting = server.exchange_of(client) is Exchange.NONE
        if not resting and client in there:
            parties.append(Present(server, there[client]))
            continue
        if not resting:
            server.absent.add(client)
        if server.keeps(client) and (resting or server.method.fleet.replay_absent):
            parties.append(Absent(server, client))
    return parties


@dataclass(frozen=True, eq=False)
class Result:
    """What `fit` returns: the history, the uncut network with the trained weights in eval mode, and the halves."""

    history: History
    model: nn.Module
    halves: Halves


def fit(
    halves: Halves,
    train: Data | Sequence[Data],
    test: Data | Sequence[Data] | None = None,
    *,
    method: Method = Method(),
    training: Training = Training(),
    task: Task = Task(),
    run: str | Path | Run | None = None,
    resume: bool = False,
    on_epoch: Callable[[EpochRecord], None] | None = None,
) -> Result:
    """Train a network that is cut in two, its clients and the server in this process, over real frames.

    Args:
        halves: from `split`, or two modules of your own. Copies of them are trained.
        train: map-style data set of (input, label), or a loader of one; a list of these for several clients, which
            work together as `Method.fleet` says.
        test: the same for evaluation, which goes over the wire, too, and is counted apart. One data set is held by
            client 0; a list has one for each client.
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
    halves, ledger, fleet = copied(halves), Ledger(), method.fleet
    feeds = _feeds(train, test, training)
    pool = Pool(
        halves.client,
        training.client,
        training.epochs,
        training.device,
        owners=len(feeds),
        live=fleet.live,
        folder=method.store.folder,
    )
    clients: list[Client] = []
    for number, (feed, test_feed) in enumerate(feeds):
        table = clients[0].flops if clients else None
        body = partial(pool.take, number)
        clients.append(Client(number, body, feed, test_feed, method, training, ledger, table))
    infos = [client_info(*pair) for pair in feeds]
    server = Server(halves.server, infos, clients[0].cut_shape, method, training, task, ledger)
    peers = [InProcessPeer(client.number, client.answers) for client in clients]
    baseline = _baseline(clients, server)

    modules, stores = server.modules(), {"clients": pool, **server.stores()}
    for client in clients:
        whose = f"_{client.number}" if len(clients) > 1 else ""
        stores |= {f"{name}{whose}": store for name, store in client.stores().items()}
    folder = run if isinstance(run, Run) or run is None else Run(run)
    records: list[EpochRecord] = []
    with folder.locked() if folder is not None else nullcontext():
        if folder is not None:
            chosen = {"method": describe(method), "training": describe(training), "task": describe(task)}
            records, state = folder.open(chosen, _facts(halves, clients), baseline, resume, modules, stores)
            if state is not None:
                server.go_back(state)
        for epoch in range(len(records), training.epochs):
            exchange, last = server.exchange, epoch + 1 == training.epochs
            states = server.exchanges
            loss = train_epoch(server, _present(clients, peers, fleet, training.seed, epoch))
            due = test is not None and (last or (epoch + 1) % training.evaluate_every == 0)
            # A C epoch is evaluated on what was sent before it, so the client sends its test activations in time.
            if exchange is not Exchange.NONE and (due or server.exchange is Exchange.NONE):
                for client, peer in zip(clients, peers, strict=True):
                    if client.test is not None:
                        peer.lose_after(None)  # who was lost in the epoch is there again to be evaluated
                        evaluate(server, peer, epoch)
            scores = server.evaluate() if due else {}
            costs = ledger.take()
            records.append(
                EpochRecord(
                    epoch,
                    exchange.value,
                    loss,
                    server.samples,
                    scores,
                    **costs,
                    states=states,
                    absent=sorted(server.absent),
                )
            )
            if folder is not None:
                # Metrics first: a kill between the two leaves a line too many, which the next start drops.
                folder.append(records[-1])
                if last or (epoch + 1) % training.checkpoint_every == 0:
                    folder.checkpoints.save(epoch + 1, modules, stores, server.saved())
            if on_epoch is not None:
                on_epoch(records[-1])
        if server.shared.tensors:
            halves.client.load_state_dict(server.shared.tensors)
        result = Result(History(records, baseline), halves.merged(), halves)
        if folder is not None:
            folder.save_model(result.model)
    return result


def _feeds(
    train: Data | Sequence[Data], test: Data | Sequence[Data] | None, training: Training
) -> list[tuple[Feed, Feed | None]]:
    """Training and test batches of each client."""
    parts: list[Any] = list(train) if isinstance(train, (list, tuple)) and not _of_tensors(train) else [train]
    tests: list[Any] = list(test) if isinstance(test, (list, tuple)) and not _of_tensors(test) else [test]
    if not parts or len(tests) > len(parts):
        raise ConfigError(
            f"expected training data of at least one client, and test data of no more clients than that, got "
            f"{len(parts)} and {len(tests)}"
        )
    feeds: list[tuple[Feed, Feed | None]] = []
    for number, part in enumerate(parts):
        feed = Feed(
            part,
            batch_size=training.batch_size,
            seed=training.seed,
            client=number,
            shuffle=training.shuffle,
            drop_last=training.drop_last,
            augment=training.augment,
        )
        held = tests[number] if number < len(tests) else None
        options = {"batch_size": feed.batch_size, "seed": training.seed, "client": number, "shuffle": False}
        feeds.append((feed, Feed(held, **options) if held is not None else None))
    return feeds


def _of_tensors(data: Sequence[Any]) -> bool:
    """Whether this is (inputs, labels), which `Feed` refuses with a hint, and not a list of data sets."""
    return isinstance(data, tuple) and all(isinstance(part, Tensor) for part in data)


def _present(
    clients: list[Client], peers: list[InProcessPeer], fleet: Fleet, seed: int, epoch: int
) -> list[InProcessPeer]:
    """The clients that take part in an epoch; some are lost in its midst, where the fleet's dropout says so."""
    chosen = [peers[number] for number in fleet.participants(seed, epoch, len(peers))]
    for peer in chosen:
        peer.lose_after(fleet.lost_after(seed, epoch, peer.number, len(clients[peer.number].train.batch_sizes())))
    return chosen


def client_info(train: Feed, test: Feed | None) -> ClientInfo:
    """What the server is told of a client's data."""
    test_samples, test_batch_size = (len(test), test.batch_size) if test is not None else (0, 0)
    samples = sum(train.batch_sizes())
    return ClientInfo(len(train), test_samples, train.batch_size, train.drop_last, test_batch_size, samples)


def _baseline(clients: list[Client], server: Server) -> Baseline:
    """Costs of an epoch of plain split learning in 32 bits with the clients' data and batches."""
    sizes = [size for client in clients for size in client.train.batch_sizes()]
    for size in set(sizes):  # a size that the server half cannot be trained on is better known now than in the epoch
        server.flops(size, input_gradient=True)
    flops = clients[0].flops
    return Baseline(sum(sizes) * numel(clients[0].cut_shape) * 4 * 2, sum(sum(flops(size)) for size in sizes))


def _facts(halves: Halves, clients: list[Client]) -> dict[str, Any]:
    """What can be said of halves and data, so that a run is not resumed with others by mistake."""
    facts: dict[str, Any] = {
        "client half": structure(halves.client),
        "server half": structure(halves.server),
    }
    for client in clients:
        first, whose = client.train.first(), f" of client {client.number}" if len(clients) > 1 else ""
        facts |= {
            f"training samples{whose}": len(client.train),
            f"batches{whose}": describe(client.train.batch_sizes()[:1] + client.train.batch_sizes()[-1:]),
            f"first samples{whose}": fingerprint(first.inputs, first.labels),
            f"test samples{whose}": len(client.test) if client.test is not None else 0,
        }
    return facts
