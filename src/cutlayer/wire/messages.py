"""What client and server say to each other: the messages, by who sends them and when."""

from __future__ import annotations

from typing import Annotated

import msgspec

# The wire's names of what the field calls microbatches.
SHORT = {"microbatch": "part", "microbatches": "parts"}
Fraction = Annotated[float, msgspec.Meta(ge=0, le=1)]


class Plan(msgspec.Struct, frozen=True, tag="plan", forbid_unknown_fields=True, omit_defaults=True):
    """Server to client: what this epoch exchanges ("A" or "B"; a client hears nothing of a C epoch).

    Attributes:
        share: in an A epoch, the steps after which the client sends its weights and waits for new ones, beside the
            end of the epoch, where it only sends them; 0 for the end alone, None if its half is its own.
        references: if changes are sent, the digest of the references that the server has of this client's samples.
        settling: how far the learning rate of the client half has fallen at the beginning and at the end of an A epoch,
            from 0 to 1; None if it follows the epochs.
        averaging: from where in that fall on weights are averaged, to take the half's place at its end; None if not.
    """

    client: int
    epoch: int
    exchange: str
    share: int | None = None
    references: int | None = None
    settling: tuple[Fraction, Fraction] | None = None
    averaging: Fraction | None = None


class Weights(msgspec.Struct, frozen=True, tag="weights", forbid_unknown_fields=True, omit_defaults=True):
    """Weights of the client half: a client's up, those that all share down.

    Attributes:
        step: steps of the epoch that the client has done; 0 for those that come before the epoch's plan.
        last: from a client, whether its epoch is at its end.
        evaluation: from the server, whether they are to be evaluated only.
        statistics: whether these are the running statistics of batch norm alone, before a B epoch.
    """

    client: int
    epoch: int
    step: int = 0
    last: bool = False
    evaluation: bool = False
    statistics: bool = False


class Calibrate(msgspec.Struct, frozen=True, tag="calibrate", forbid_unknown_fields=True, omit_defaults=True):
    """Server to client: measure the batch norm statistics of the half anew.

    Attributes:
        share: send them up, to be pooled with the other clients'.
        evaluation: whether they are to be evaluated with, after an A epoch; otherwise the plan of a B epoch follows.
    """

    client: int
    epoch: int
    share: bool = False
    evaluation: bool = False


class Step(msgspec.Struct, frozen=True, tag="step", forbid_unknown_fields=True, omit_defaults=True, rename=SHORT):
    """Client to server: ids, labels and activations of one batch, or of one microbatch of it.

    Attributes:
        microbatch: its number, from 0.
        microbatches: how many the batch has.
        samples: of the whole batch; 0 if it has one microbatch.
        anew: in the first step of an epoch, that the client has let go of its references, and so must the server.
    """

    client: int
    epoch: int
    step: int
    microbatch: int = 0
    microbatches: int = 1
    samples: int = 0
    anew: bool = False

    @property
    def starts(self) -> bool:
        """Whether this is the only or first microbatch of the batch."""
        return self.microbatch == 0

    @property
    def ends(self) -> bool:
        """Whether this is the only or last microbatch of the batch."""
        return self.microbatch + 1 == self.microbatches


class Update(msgspec.Struct, frozen=True, tag="update", forbid_unknown_fields=True, omit_defaults=True, rename=SHORT):
    """Server to client: gradients of the loss with respect to the activations of a step, or of a microbatch of it."""

    client: int
    epoch: int
    step: int
    microbatch: int = 0


class Evaluate(msgspec.Struct, frozen=True, tag="evaluate", forbid_unknown_fields=True):
    """Client to server: ids, labels and activations of a batch that is only evaluated."""

    client: int
    epoch: int
    step: int


# Between processes a run needs a few messages more.


class Hello(msgspec.Struct, frozen=True, tag="hello", forbid_unknown_fields=True):
    """Client to server, first on every connection: who it is, what it holds and what it takes for granted.

    Attributes:
        name: the client's, which must be that of its certificate.
        session: the session to go on with after a lost connection; "" to begin one.
        received: frames of that session that have come in.
        run: the run that its checkpoints belong to; "" if it has none.
        checkpoints: the epochs after which it has one.
        samples, test_samples, batch_size, drop_last, test_batch_size, frozen, bfloat16: as in `checks.ClientSummary`.
        epoch_samples, epoch_steps, epoch_flops, epoch_bytes, epoch_forward: of an epoch of plain split learning, see
            `plain`.
        epoch_defence: FLOPs of its defences in an A epoch.
        epoch_labels: bytes that its labels may take in an epoch beyond those in `epoch_bytes`.
        weights_bytes: bytes of a frame that holds the client half.
        half_bytes: bytes of the largest such frame.
        terms: what both sides must agree on, by name.
    """

    name: str
    session: str = ""
    received: int = 0
    run: str = ""
    checkpoints: tuple[int, ...] = ()
    samples: int = 0
    test_samples: int = 0
    batch_size: int = 0
    drop_last: bool = False
    test_batch_size: int = 0
    frozen: bool = False
    bfloat16: bool = False
    epoch_samples: int = 0
    epoch_steps: int = 0
    epoch_flops: int = 0
    epoch_forward: int = 0
    epoch_defence: int = 0
    epoch_bytes: int = 0
    epoch_labels: int = 0
    weights_bytes: int = 0
    half_bytes: int = 0
    terms: dict[str, str] = {}


class Welcome(msgspec.Struct, frozen=True, tag="welcome", forbid_unknown_fields=True):
    """Server to client, the answer to a Hello.

    Attributes:
        client: the client's number.
        session: the session that begins or goes on.
        received: frames of it that the server has.
        run: the run's id.
        restore: if a session begins, the number of epochs after which the client's checkpoint is to be loaded.
    """

    client: int
    session: str
    received: int
    run: str
    restore: int


class Refusal(msgspec.Struct, frozen=True, tag="refusal", forbid_unknown_fields=True):
    """Server to client: why a frame or a connection is refused. `retry`: a new session would not be."""

    reason: str
    retry: bool = False


class Saved(msgspec.Struct, frozen=True, tag="saved", forbid_unknown_fields=True):
    """Server to client: its oldest checkpoint is that after this many epochs, it will not go back behind it.

    Attributes:
        best: after how many epochs the checkpoint of the best epoch is, which stays on either side; -1 for none.
    """

    epochs: int
    best: int = -1


class Leave(msgspec.Struct, frozen=True, tag="leave", forbid_unknown_fields=True):
    """Client to server: it leaves the run for good. The answer is a `Finished`."""

    name: str


class EvaluationRequest(msgspec.Struct, frozen=True, tag="ask", forbid_unknown_fields=True):
    """Server to client: send the activations of the test data."""

    client: int
    epoch: int


class Done(msgspec.Struct, frozen=True, tag="done", forbid_unknown_fields=True, omit_defaults=True):
    """Client to server: it has sent all `steps` of the epoch, or of the `evaluation`, and saved what they changed."""

    client: int
    epoch: int
    steps: int
    flops: dict[str, int]
    evaluation: bool = False


class Finished(msgspec.Struct, frozen=True, tag="finished", forbid_unknown_fields=True):
    """Server to client: the run is at its end, for this client at least."""


class Offer(msgspec.Struct, frozen=True, tag="offer", forbid_unknown_fields=True):
    """Server to client: the run's config as JSON, for a client that has none of its own."""

    config: str


# A trained network, in halves.


class Predict(msgspec.Struct, frozen=True, tag="predict", forbid_unknown_fields=True):
    """Client to server: activations of a batch, to be answered with the network's outputs."""

    number: int


class Outputs(msgspec.Struct, frozen=True, tag="outputs", forbid_unknown_fields=True):
    """Server to client: the outputs of the batch of this number."""

    number: int


Message = (
    Plan
    | Weights
    | Calibrate
    | Step
    | Update
    | Evaluate
    | Hello
    | Welcome
    | Refusal
    | Saved
    | Leave
    | EvaluationRequest
    | Done
    | Finished
    | Offer
    | Predict
    | Outputs
)
