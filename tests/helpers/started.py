"""Processes that run a module, as `python -m` does, without each importing PyTorch anew; see `zygote`."""

from __future__ import annotations

import functools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@functools.cache
def zygote() -> socket.socket:
    """The connection to this process's zygote, which ends when this process does."""
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    command = [sys.executable, "-m", "tests.helpers.zygote", str(its.fileno())]
    subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdin=subprocess.DEVNULL, pass_fds=[its.fileno()])
    its.close()
    return ours


class Started:
    """A process: what `subprocess.Popen` offers, as far as it is used here.

    Args:
        stdout, stderr: descriptors, which are closed here.
    """

    def __init__(
        self, module: str, *arguments: object, cwd: Path, env: Mapping[str, str], stdout: int, stderr: int
    ) -> None:
        self.args, self.returncode = [module, *map(str, arguments)], None
        self._told, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        request = {"module": module, "arguments": self.args[1:], "cwd": str(cwd), "env": dict(env)}
        socket.send_fds(zygote(), [json.dumps(request).encode()], [its.fileno(), stdout, stderr])
        its.close()
        for descriptor in {stdout, stderr}:
            os.close(descriptor)
        self.pid = int(self._told.recv(32))

    def wait(self, timeout: float | None = None) -> int:
        """The exit status. Raises subprocess.TimeoutExpired."""
        if self.returncode is None:
            self._told.settimeout(timeout)
            try:
                self.returncode = int(self._told.recv(32))
            except (TimeoutError, BlockingIOError):
                raise subprocess.TimeoutExpired(self.args, timeout or 0) from None
            self._told.close()
        return self.returncode

    def poll(self) -> int | None:
        """The exit status if it has ended."""
        try:
            return self.wait(0)
        except subprocess.TimeoutExpired:
            return None

    def send_signal(self, number: signal.Signals) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def run(
    module: str, *arguments: object, cwd: Path = ROOT, env: Mapping[str, str] = ENVIRONMENT, timeout: float = 240
) -> subprocess.CompletedProcess:
    """Run a module to its end."""
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        stdout, stderr = os.dup(output.fileno()), os.dup(errors.fileno())
        process = Started(module, *arguments, cwd=cwd, env=env, stdout=stdout, stderr=stderr)
        try:
            status = process.wait(timeout)
        except BaseException:
            process.kill()
            raise
        return subprocess.CompletedProcess(process.args, status, *map(_text, (output, errors)))


def start(module: str, *arguments: object, cwd: Path = ROOT, env: Mapping[str, str] = ENVIRONMENT) -> Started:
    """Start a module whose output goes nowhere."""
    stdout, stderr = (os.open(os.devnull, os.O_WRONLY) for _ in range(2))
    return Started(module, *arguments, cwd=cwd, env=env, stdout=stdout, stderr=stderr)


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode()
