"""The command line: `cutlayer COMMAND ...`. `COMMANDS` names them all; those between machines are in `remote`, too."""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version

from rich.console import Console

from cutlayer.cli.afterwards import export, predict_command
from cutlayer.cli.attack import attack
from cutlayer.cli.compare import compare
from cutlayer.cli.completion import completion
from cutlayer.cli.demo import demo
from cutlayer.cli.forget import forget
from cutlayer.cli.merge import merge
from cutlayer.cli.partition import partition
from cutlayer.cli.plan import plan
from cutlayer.cli.report import report
from cutlayer.cli.study import frontier_command, reproduce
from cutlayer.cli.train import train
from cutlayer.errors import ConfigError, CutlayerError, unknown
from cutlayer.report.plain import plain_console, warn


def remote(name: str, about: str) -> Callable[[Sequence[str], Console], None]:
    """A command between machines; its module is imported when it is called, as it needs the extra `grpc`."""

    def command(arguments: Sequence[str], console: Console) -> None:
        if name != "serve":  # which has gRPC's core log who is refused; the others see for themselves what is wrong
            os.environ.setdefault("GRPC_VERBOSITY", "NONE")
        try:
            from cutlayer.cli import remote as machines
        except ModuleNotFoundError as error:
            raise ConfigError(f"`cutlayer {name}` needs {error.name}: pip install 'cutlayer[grpc]'") from None
        machines.COMMANDS[name](arguments, console)

    command.__doc__ = about
    return command


COMMANDS = {
    "plan": plan,
    "train": train,
    "attack": attack,
    "compare": compare,
    "report": report,
    "demo": demo,
    "merge": merge,
    "export": export,
    "predict": predict_command,
    "partition": partition,
    "forget": forget,
    "reproduce": reproduce,
    "frontier": frontier_command,
    "certs": remote("certs", "Make certificates for a server and its clients."),
    "answer": remote("answer", "Answer devices that hold the client half of a trained network."),
    "serve": remote("serve", "Hold the server half of a run for clients on other machines."),
    "join": remote("join", "Take part in a run that another machine serves."),
    "health": remote("health", "Ask whether a server is up."),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status: 0, 1 for a run that failed, 2 for a wrong call.

    `--quiet` and `--debug` go with every command: nothing but errors is shown; errors come with their traceback.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    arguments = [argument for argument in given if argument not in ("--quiet", "--debug")]
    console = plain_console(quiet="--quiet" in given)
    if not arguments or arguments[0] in ("-h", "--help"):
        console.print("usage: cutlayer COMMAND ...   (cutlayer COMMAND --help explains it)\n")
        for name, command in {**COMMANDS, "completion": completion}.items():
            console.print(f"  {name:10} {(command.__doc__ or '').partition(': eval')[0]}")
        console.print("\n  with each: --quiet shows errors alone, --debug shows where they come from")
        return 0 if arguments else 2
    if arguments[0] == "--version":
        console.print(version("cutlayer"))
        return 0
    try:
        with _ended_by_sigterm():
            return _carry_out(arguments, console)
    except (Exception, KeyboardInterrupt) as error:
        if "--debug" in given:
            traceback.print_exc()
        return _say(error)


class _Terminated(KeyboardInterrupt):
    """SIGTERM came."""


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Inside the block SIGTERM ends a command as Ctrl-C does: it lets go of what it has, and says how to go on."""

    def end(*_: object) -> None:
        raise _Terminated

    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield  # whoever calls this has a mind of its own
        return
    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _carry_out(arguments: Sequence[str], console: Console) -> int:
    try:
        if arguments[0] == "completion":
            completion(arguments[1:], console, COMMANDS)
        elif arguments[0] not in COMMANDS:
            raise ConfigError(unknown("command", arguments[0], COMMANDS))
        else:
            COMMANDS[arguments[0]](arguments[1:], console)
    except BrokenPipeError:  # the reader of a pipe, such as `head`, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0


def _say(error: BaseException) -> int:
    """Say in one line what is wrong; return the exit status."""
    line, status = f"error: {error}", 1
    if isinstance(error, KeyboardInterrupt):
        terminated = isinstance(error, _Terminated) or isinstance(error.__context__, _Terminated)
        line, status = str(error) or "interrupted", 143 if terminated else 130
    elif isinstance(error, ConfigError):
        status = 2
    elif not isinstance(error, (CutlayerError, OSError)):
        what = " ".join(str(error).split())
        line = f"error: {type(error).__name__}: {what}; run it again with --debug to see where it comes from"
    warn(line)
    return status


if __name__ == "__main__":
    sys.exit(main())
