"""What `cutlayer join` may reveal and do: the options, and the question to the person before the first frame."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

from rich.console import Console
from torch import nn

from cutlayer.backends.grpc.policy import Policy, revealed
from cutlayer.errors import ConfigError, RefusedError, harmless
from cutlayer.method import Method

ANY = "any"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyArguments:
    """What this machine is willing to reveal and to do, whatever the server asks."""

    accept_cut: tuple[str, ...] = ()
    """Names of cuts to accept without a question, or "any"."""
    accept_exact: bool = False
    """Accept a cut with no fewer values than the input, in 16 bits or more each, from which the input may be solved."""
    accept_codec: tuple[str, ...] | None = None
    """Codecs of activations to accept, as the server's config writes them; by default any."""
    labels: bool = True
    """Let labels leave. Without, runs that need them are refused."""
    evaluation: bool = True
    """Let activations of test data leave."""
    weights: bool = True
    """Let weights of the first part leave, and take others' in their place, if several clients take part."""
    max_views: int | None = None
    """How often activations of this machine's data may leave, in all."""
    max_width: float = Policy.width
    """Widest network to take from the server's config."""
    max_threads: int = Policy.threads
    """Most threads to take from the server's config."""
    max_checkpoints: int = Policy.checkpoints
    """Checkpoints to store for a server that does not say that it has saved any itself."""

    def policy(self, clients: int = 2) -> Policy:
        """The rules of a run with so many clients; with one there is no reason for weights to cross."""
        return Policy(
            codecs=self.accept_codec,
            exact=self.accept_exact,
            labels=self.labels,
            evaluation=self.evaluation,
            weights=self.weights and clients > 1,
            views=self.max_views,
            checkpoints=self.max_checkpoints,
            width=self.max_width,
            threads=self.max_threads,
        )


def check_sizes(values: Any, policy: Policy) -> None:
    """Check what a server's config asks for before anything is built from it. Raises RefusedError."""
    parts = {"model": ("width", "client_width", "cut"), "training": ("batch_size",)}
    found = {name: values.get(part, {}).get(name) for part, names in parts.items() for name in names}
    policy.check_config({**found, "threads": values.get("threads")})


def ask(
    arguments: PolicyArguments,
    policy: Policy,
    cut: str,
    half: tuple[nn.Module, Method, tuple[int, ...], tuple[int, ...]],
    console: Console,
) -> None:
    """Say what will leave this machine, and go on if the cut was accepted or the person says so.

    Args:
        cut: its name.
        half: the first part, the run's method, and the shapes of a sample at the cut and at the input.

    Raises:
        RefusedError: the policy does not allow it, or the person does not want it.
        ConfigError: there is no one to ask.
    """
    module, method, cut_shape, input_shape = half
    policy.check_method(method)
    policy.check_cut(method, cut_shape, input_shape)
    text = f"Cut after {harmless(cut, 80)}. " + revealed(method, module, cut_shape, input_shape, policy)
    console.print(text, soft_wrap=True)
    if cut in arguments.accept_cut or ANY in arguments.accept_cut:
        return
    if not sys.stdin.isatty():
        raise ConfigError(
            f"cut: nobody has accepted what would leave this machine; say --accept-cut {harmless(cut, 80)}"
            + (f" (accepted: {', '.join(arguments.accept_cut)})" if arguments.accept_cut else "")
        )
    if input("Take part? [y/N] ").strip().lower() not in ("y", "yes"):
        raise RefusedError("not taken part: the cut was not accepted")
