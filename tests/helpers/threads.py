"""Server and clients as threads of one process, connected over gRPC, and the same run without gRPC."""

import contextlib
import copy
import itertools
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from cutlayer.data.datasets import outline
from cutlayer.data.images import Images
from cutlayer.records.history import EpochRecord
from cutlayer.runs.config import RunConfig
from cutlayer.runs.fit import Result, fit
from cutlayer.runs.join import join
from cutlayer.runs.serve import Callbacks, Served, serve
from cutlayer.stop_request import Stopped

CUT = (16, 4, 4)


class Together:
    """A server in a thread, without TLS, on this machine."""

    def __init__(
        self,
        config: RunConfig,
        folder: Path,
        clients: tuple[str, ...],
        on_epoch: Callable[[EpochRecord], None] = lambda record: None,
        **more: Any,
    ) -> None:
        self.config, self.folder = config, folder
        self.served: Served | None = None
        # Made here: while torch.fx cuts a network, no other thread can run one.
        halves = config.halves(outline("digits"))
        self.half = halves.client
        listening = threading.Event()

        def ready(port: int) -> None:
            self.port = port
            listening.set()

        def run() -> None:
            with contextlib.suppress(Stopped):
                self.served = serve(
                    halves.server,
                    CUT,
                    listen="127.0.0.1:0",
                    run=folder / "server",
                    clients=clients,
                    method=config.method,
                    training=config.training,
                    callbacks=Callbacks(on_epoch, ready),
                    **more,
                )

        self.thread = threading.Thread(target=run, daemon=True)
        self.thread.start()
        assert listening.wait(20)

    def join_all(
        self, data: Mapping[str, tuple[Any, Any]], late: str = "", timeout: float = 120
    ) -> dict[str, torch.nn.Module]:
        """All clients take part, each in a thread, one of them half a second later; their halves at the end."""
        halves: dict[str, torch.nn.Module] = {}

        def take_part(name: str) -> None:
            time.sleep(0.5 * (name == late))
            halves[name] = self.join(name, *data[name])

        threads = [threading.Thread(target=take_part, args=(name,), daemon=True) for name in data]
        for thread in threads:
            thread.start()
        for thread in (*threads, self.thread):
            thread.join(timeout)
        return halves

    def join(self, name: str, train: Any, test: Images | None, **more: object) -> torch.nn.Module:
        return join(
            f"127.0.0.1:{self.port}",
            copy.deepcopy(self.half),
            train,
            test,
            folder=more.pop("folder", self.folder / name),
            name=name,
            method=self.config.method,
            training=self.config.training,
            **more,
        )


def part(data: Images, start: int, end: int) -> Images:
    return Images(data.inputs[start:end], data.labels[start:end], data.mean, data.std, data.classes)


def shares(config: RunConfig, names: tuple[str, ...]) -> dict[str, tuple[Images, Images | None]]:
    """The training data in unequal parts, the test data with the first client."""
    train, test = config.datasets()
    cuts = [*(0, 96, 160, 192)[: len(names)], 200]
    parts = [part(train, start, end) for start, end in itertools.pairwise(cuts)]
    return {name: (share, test if name == names[0] else None) for name, share in zip(names, parts, strict=True)}


def in_process(config: RunConfig, data: dict[str, tuple[Images, Images | None]]) -> Result:
    sets, tests = ([pair[place] for pair in data.values()] for place in (0, 1))
    halves = config.halves(sets[0])
    return fit(halves, sets, tests[0], method=config.method, training=config.training)
