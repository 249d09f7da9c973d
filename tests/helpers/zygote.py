"""A process that has imported PyTorch and cutlayer, of which forks become the processes that tests start.

Importing takes seconds of processor time, for every one of them. A fork has a process id, output, signals and an exit
status of its own, as if `python -m MODULE` had been started.

python -m tests.helpers.zygote DESCRIPTOR
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import runpy
import signal
import socket
import sys
import threading
import traceback

import sklearn.datasets  # noqa: F401

import cutlayer.cli.entry  # noqa: F401

REQUEST_BYTES = 1 << 17


def main(control: socket.socket) -> None:
    """Take requests until the other end is closed; in a fork, return with the module to be run."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # keepers are waited for by no one
    while True:
        message, descriptors, _, _ = socket.recv_fds(control, REQUEST_BYTES, 3)
        if not message:
            os._exit(0)
        if os.fork() == 0:
            control.close()
            return keep(json.loads(message), descriptors)
        for descriptor in descriptors:
            os.close(descriptor)


def keep(request: dict, descriptors: list[int]) -> None:
    """Fork the process, tell its id and in the end its exit status; in the process, return to run the module."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    told = socket.socket(fileno=descriptors[0])
    if (pid := os.fork()) == 0:
        told.close()
        become(request, descriptors[1:])
        return
    for descriptor in descriptors[1:]:
        os.close(descriptor)
    told.send(str(pid).encode())
    _, status = os.waitpid(pid, 0)
    told.send(str(os.waitstatus_to_exitcode(status)).encode())
    os._exit(0)


def become(request: dict, outputs: list[int]) -> None:
    """What `python -u -m MODULE` has when it begins."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for descriptor, output in enumerate(outputs, 1):
        os.dup2(output, descriptor)
        os.close(output)
    sys.stdout = sys.__stdout__ = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.stderr = sys.__stderr__ = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    sys.argv = [request["module"], *request["arguments"]]


def exit_status() -> int:
    """Run the module; what it ends with."""
    try:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    gc.freeze()  # what is imported is not looked through again, which would copy it for each fork
    main(socket.socket(fileno=int(sys.argv[1])))
    status = exit_status()
    # As the interpreter ends, but for freeing every object, which would copy them as well.
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
