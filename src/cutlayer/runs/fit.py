"""A run in one process or on a cluster, from Python: clients and server are made here, `loop` trains them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from cutlayer.backends.base import Backend, TrustedClients
from cutlayer.backends.client_data import Data, client_data_of
from cutlayer.backends.description import ClientDescription
from cutlayer.backends.local import LOCAL
from cutlayer.describe import describe, structure
from cutlayer.errors import ConfigError, RefusedError
from cutlayer.method import Method, Task, Training, require_choices
from cutlayer.models.cut import Halves, copied
from cutlayer.records.checkpoint import Checkpoints
from cutlayer.records.history import EpochRecord, History
from cutlayer.records.ledger import Ledger
from cutlayer.report import shown
from cutlayer.runs.initial import initialize
from cutlayer.runs.loop import Loop
from cutlayer.runs.run import Run
from cutlayer.temporary import TemporaryFolder
from cutlayer.training.evaluation import scores_of
from cutlayer.training.job import Job
from cutlayer.training.server import Server


@dataclass(frozen=True, eq=False)
class Result:
    """What `fit` returns: the history, the uncut network with the trained weights in eval mode, and the halves."""

    history: History
    model: nn.Module
    halves: Halves

    def __repr__(self) -> str:
        """Short: the history, and the model's class."""
        return f"Result({self.history!r}, model=<{type(self.model).__name__}>)"


def fit(
    halves: Halves,
    train: Data | Sequence[Data],
    test: Data | Sequence[Data | None] | None = None,
    *,
    method: Method = Method(),
    training: Training = Training(),
    task: Task = Task(),
    run: str | Path | Run | None = None,
    resume: bool = False,
    on_epoch: Callable[[EpochRecord], None] | None = None,
    progress: bool | None = None,
    backend: Backend = LOCAL,
    init: str | Path | Run | None = None,
) -> Result:
    """Train a network that is cut in two, over real frames; its clients in this process, or where a backend has them.

    Args:
        halves: from `split`, or two modules of your own. Copies of them are trained.
        train: map-style data set of (input, label), a list of such pairs among them, or a loader of one, or a function
            that returns either, called where the client is; a list of these for several clients, which work together
            as `Method.fleet` says.
        test: the same for evaluation, which goes over the wire, too, and is counted apart. One data set is held by
            client 0; a list has one for each client. At the end the merged model is evaluated on them, too, in this
            process and in 32 bits (`History.merged`), unless a function returns them elsewhere.
        method: when to communicate and in which number format.
        training: epochs, optimizers, seed, device.
        task: loss and metrics; cross-entropy and accuracy by default.
        run: folder to write config, metrics, checkpoints and the merged model to.
        resume: go on from the newest checkpoint in `run`, if there is one; with the same arguments as before, the
            result is the same, bit for bit, as without the interruption, whatever the backend before and now. With
            more `epochs` than before the run is extended; see docs/runs.md.
        on_epoch: called after each epoch with its record; again for epochs that are trained again, if a backend lost
            something.
        progress: whether to show on stderr how far the run is: a bar on a terminal, elsewhere a line now and then. By
            default it is shown on a terminal and in a notebook, and a script whose output goes elsewhere is quiet.
        backend: where the clients are, such as `backends.ray.Ray()`. The result is the same, bit for bit.
        init: a run, finished or not, whose weights the halves begin with; its network must have the same structure.

    Raises:
        ConfigError: the arguments contradict each other, the data, or the run that is to be resumed.
        DivergedError: loss, activations or gradients became infinite or NaN; the last checkpoint stays.
        StoreFullError: the activations of all samples exceed the replay store's budget, which is checked before
            training begins (for labels of one number), or the disk is full.
    """
    _check(halves, method, training, task)
    if resume and run is None:
        raise ConfigError("resume needs the folder of the run")
    halves, ledger, folder = copied(halves), Ledger(), run if isinstance(run, Run) or run is None else Run(run)
    initialize(halves, init, folder, resume)
    data = client_data_of(train, test)
    with ExitStack() as stack:
        clients = stack.enter_context(closing(backend.open(halves.client, data, method, training, ledger)))
        bfloat16 = all(summary.bfloat16 for summary in clients.summaries)
        job = Job(halves.server, clients.descriptions[0].cut_shape, method, training, task, bfloat16)
        server = _server(job, clients, ledger)
        loop = Loop(clients, server, folder, _begin_checkpoints(stack, clients, folder))
        loop.open(_chosen(job), _facts(halves, clients.descriptions), resume)
        title = type(method.schedule).__name__.lower()
        view = stack.enter_context(shown(title, training.epochs, loop.records, progress))
        with _of_one_client(len(data) == 1):
            loop.train([each for each in (view, on_epoch) if each is not None])
        model, merged = _merge(halves, loop, clients)
    return Result(History(loop.records, loop.baseline, loop.given_up(), merged), model, halves)


@contextmanager
def _of_one_client(alone: bool) -> Iterator[None]:
    """What is refused in a run of one client in one process is the user's own data: no number has to say whose."""
    try:
        yield
    except RefusedError as error:
        if alone:
            error.args = (str(error).removeprefix("client 0: "),)
        raise


def _check(halves: object, method: object, training: object, task: object) -> None:
    if not isinstance(halves, Halves):
        raise ConfigError(
            f"expected Halves, from split(model, layer) or Halves(client, server), got {type(halves).__name__}"
        )
    require_choices(method, training, task)


def _server(job: Job, clients: TrustedClients, ledger: Ledger) -> Server:
    """The server; it has seen all sizes of batches: one that cannot be trained on is better known now."""
    server = clients.server(job, ledger)
    for size in {size for description in clients.descriptions for size in description.sizes}:
        server.flops(size, input_gradient=True)
    return server


def _begin_checkpoints(stack: ExitStack, clients: TrustedClients, folder: Run | None) -> Checkpoints | None:
    """Where checkpoints go until the stack ends, if there are any: the run's folder, which no one else then uses."""
    if folder is not None:
        stack.enter_context(folder.locked())
        return folder.checkpoints
    if clients.can_lose_state:
        return Checkpoints(stack.enter_context(TemporaryFolder("checkpoints")).path)
    return None


def _merge(halves: Halves, loop: Loop, clients: TrustedClients) -> tuple[nn.Module, dict[str, float]]:
    """The uncut network at the end of the run, and its scores on the test data that can be read here."""
    server, folder = loop.server, loop.folder
    clients.load_half(halves.client)
    if server.shared.tensors:
        halves.client.load_state_dict(server.shared.tensors)
    model = halves.merged()
    if folder is not None:
        folder.save_model(model)
    scores = scores_of(model, clients.test_batches(), server.job.task, server.job.training.device)
    if folder is not None:
        folder.save_merged(scores, len(loop.records))
    return model, scores


def _chosen(job: Job) -> dict[str, Any]:
    """What config.json holds of a run that was begun from Python."""
    return {"method": describe(job.method), "training": describe(job.training), "task": describe(job.task)}


def _facts(halves: Halves, clients: Sequence[ClientDescription]) -> dict[str, Any]:
    """What can be said of halves and data, so that a run is not resumed with others by mistake."""
    facts = {"client half": structure(halves.client), "server half": structure(halves.server)}
    for number, client in enumerate(clients):
        facts |= client.as_dict(f" of client {number}" if len(clients) > 1 else "")
    return facts
