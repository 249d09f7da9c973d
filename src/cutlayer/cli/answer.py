"""The command `cutlayer answer`: split inference for devices that hold the client half."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import tyro
from rich.console import Console

from cutlayer.backends.grpc.name_files import Revocations, read_again_on_signal
from cutlayer.backends.grpc.rpc import Endpoint
from cutlayer.models.flops import FlopTable
from cutlayer.runs.answer import Answers
from cutlayer.runs.config import RunConfig
from cutlayer.runs.export import load_halves
from cutlayer.runs.run import Run


@dataclasses.dataclass(frozen=True)
class AnswerArguments:
    """Hold the trained server half of a recipe's run, for devices that send activations (cutlayer-device predict)."""

    run: tyro.conf.Positional[str]
    """Folder of the run."""
    listen: str = "127.0.0.1:7071"
    """HOST:PORT to take requests on."""
    tls: str | None = None
    """This machine's folder of certificates."""
    insecure_plaintext: bool = False
    """Allow addresses beyond this machine without TLS."""
    revoked: str | None = None
    """File with the names, one a line, whose certificates do not count any more; read again on SIGHUP."""
    codec: str | None = None
    """Codec of the activations; by default that of the run. No other is taken."""
    client: str | None = None
    """Folder of the client, for a run that was served to one client."""
    best: bool = False
    """The best epoch's weights, of a run with --keep-best, in place of the last one's."""


def answer(arguments: Sequence[str], console: Console) -> None:
    """Answer devices that hold the client half of a trained network."""
    chosen = tyro.cli(AnswerArguments, prog="cutlayer answer", args=arguments)
    run = Run(chosen.run)
    config = RunConfig.from_dict(run.read_config()["config"])
    halves = load_halves(run, best=chosen.best, client=chosen.client)
    codec = chosen.codec or config.method.activations
    inputs = config.data.outline().inputs
    cut_shape = FlopTable(halves.client, inputs.shape[1:], inputs.dtype).output_shape
    endpoint = Endpoint(chosen.listen, chosen.tls, chosen.insecure_plaintext)
    revoked = Revocations(chosen.revoked) if chosen.revoked is not None else None
    answers = Answers(halves.server, cut_shape, codec, endpoint, revoked)
    how = "mutual TLS" if chosen.tls else "plain text"
    console.print(f"answering on port {answers.port} ({how}), activations in {answers.codec.name}")
    with read_again_on_signal(revoked):
        try:
            answers.wait()
        except KeyboardInterrupt:
            answers.close()
