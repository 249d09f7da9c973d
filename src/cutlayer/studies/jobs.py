"""Work for several processes, which end with the one that began them, however that ends."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

import torch

from cutlayer.errors import CutlayerError

Item = TypeVar("Item")
Value = TypeVar("Value")


def each(work: Callable[[Item], Value], items: Iterable[Item], jobs: int) -> Iterator[tuple[Item, Value | Exception]]:
    """Do the work for each item; give item and result, or the error, as they come.

    Args:
        jobs: how many items are worked on side by side. One is worked on in this process; more are in processes of
            their own, of one PyTorch thread each.
    """
    if jobs == 1:
        for item in items:
            yield item, _attempt(work, item)
        return
    waiting: list[Item] = list(items)
    at_work: dict[Any, Item] = {}
    context = multiprocessing.get_context("spawn")
    processes = []
    try:
        for _ in range(min(jobs, len(waiting))):
            mine, other = context.Pipe()
            processes.append(context.Process(target=_serve, args=(other, work), daemon=True))
            processes[-1].start()
            other.close()
            at_work[mine] = waiting.pop(0)
            mine.send(at_work[mine])
        while at_work:
            for ready in [connection for connection in wait(list(at_work)) if isinstance(connection, Connection)]:
                item = at_work.pop(ready)
                try:
                    result: Value | Exception = ready.recv()
                except EOFError:
                    result = CutlayerError("its process ended, such as for want of memory")
                else:
                    if waiting:
                        at_work[ready] = waiting.pop(0)
                        ready.send(at_work[ready])
                yield item, result
        for item in waiting:
            yield item, CutlayerError("no process was left for it")
    finally:
        for process in processes:
            process.terminate()
            process.join()


def _attempt(work: Callable[[Item], Value], item: Item) -> Value | Exception:
    try:
        return work(item)
    except Exception as error:  # of this item; the others do not depend on it
        return error


def _serve(connection: Connection, work: Callable[[Any], Any]) -> None:
    """A process's part: one item after the other."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # by way of whatever has files to remove
    torch.set_num_threads(1)
    while True:
        result = _attempt(work, connection.recv())
        if isinstance(result, Exception):
            result = CutlayerError(f"{type(result).__name__}: {result}")  # which every process knows
        connection.send(result)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
