"""What comes in from clients: checked against the run before any of it is used. Each refusal says what came."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import msgspec
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from cutlayer.codecs import (
    INTEGER_CODECS,
    Codec,
    Encoded,
    evaluation_codec,
    get_codec,
    get_transfer,
    isfinite,
    magnitude,
)
from cutlayer.errors import ConfigError, RefusedError, some
from cutlayer.method import Task
from cutlayer.schedule import Exchange
from cutlayer.training.job import Job
from cutlayer.wire.frames import Field, Received
from cutlayer.wire.messages import Step

PROBABILITIES_OFF = 0.01
"""How far the sum of a sample's probabilities may be from 1, as of ones that were rounded."""
OTHER_TASK = "If this is regression, give Task(loss=torch.nn.functional.mse_loss, metrics={})"
NAMES = ["ids", "labels", "activations"]
NAMES_OF_CHANGES = [*NAMES, "sent"]


@dataclass(frozen=True)
class ClientSummary:
    """What the server knows of a client.

    Attributes:
        samples, test_samples: numbers of training and test samples; ids stay below them.
        batch_size: samples in the largest batch it trains on, and in the batches of a C epoch.
        drop_last: whether a last, smaller batch is left out, in a C epoch as well.
        test_batch_size: samples in the largest batch it evaluates; 0 for as many as it trains on.
        epoch_samples: samples in its first epoch, which a sampler may make more or fewer than `samples`.
        frozen: whether nothing of its half is trained, so that it needs no gradients.
        bfloat16: whether its activations are bfloat16 before they are encoded.
    """

    samples: int
    test_samples: int
    batch_size: int
    drop_last: bool = False
    test_batch_size: int = 0
    epoch_samples: int = 0
    frozen: bool = False
    bfloat16: bool = False


@dataclass(frozen=True)
class Classes:
    """What labels may be in a classification.

    Attributes:
        count: labels are whole numbers below it, or probabilities of so many.
        shape: of a label that is a whole number; None for any.
        ignored: a label that the loss leaves out, if there is one; a whole batch of it is refused.
    """

    count: int
    shape: tuple[int, ...] | None = None
    ignored: int | None = None


def ignored_label(task: Task) -> int | None:
    """The label that cross-entropy leaves out; None for another loss."""
    if task.loss is cross_entropy:
        return -100  # its default
    return task.loss.ignore_index if isinstance(task.loss, nn.CrossEntropyLoss) else None


def classes_of(task: Task, output_shape: tuple[int, ...]) -> Classes | None:
    """From `Task.classes`, or from cross-entropy on outputs [B, classes]; None for other tasks."""
    if (ignored := ignored_label(task)) is None:
        return Classes(task.classes) if task.classes is not None else None
    if len(output_shape) == 1:
        if output_shape[0] == 1:
            raise ConfigError(
                f"cross-entropy, the loss of classification, cannot learn from outputs of one number. {OTHER_TASK}"
            )
        return Classes(task.classes or output_shape[0], (), ignored)
    return Classes(task.classes, None, ignored) if task.classes is not None else None


def decoded(codec: Codec, encoded: Encoded, device: torch.device, message: object) -> tuple[Tensor, float]:
    """The activations of a message, on a device, and the largest magnitude. Raises RefusedError if it is not finite."""
    activations = codec.decode(encoded.to(device))
    largest = magnitude(activations)
    if not math.isfinite(largest):
        raise RefusedError(f"{message}: activations: expected finite values, got infinities or NaN")
    return activations, largest


class FrameChecks:
    """The checks of a run.

    Args:
        clients: what is known of each client, by number.
        output_shape: shape of one sample's outputs, which tells what labels of a classification may be; labels of other
            tasks all have the type and shape of the first.
    """

    def __init__(self, job: Job, clients: list[ClientSummary], output_shape: tuple[int, ...]) -> None:
        transfer = get_transfer(job.method.activations)
        self.clients, self.cut_shape, self.delta = clients, job.cut_shape, transfer.delta is not None
        self.classes = classes_of(job.task, output_shape)
        self.codecs = {False: transfer.codec.name, True: evaluation_codec(transfer).name}
        # Training and test labels may differ in kind: probabilities of a mixture there, classes here.
        self._label_kinds: dict[bool, tuple[bool, tuple[int, ...]]] = {}

    def check_client(self, client: int) -> None:
        """Raise RefusedError for a client that there is not."""
        if not 0 <= client < len(self.clients):
            raise RefusedError(f"client: expected a number from 0 to {len(self.clients) - 1}, got {client}")

    def check_order(self, last: Step | None, message: Step, exchange: Exchange) -> None:
        """A step follows its predecessor's last microbatch, a microbatch the one before; `last` is of this epoch."""
        if last is not None and not last.ends:
            expected = msgspec.structs.replace(last, microbatch=last.microbatch + 1)
            if message != expected:
                raise RefusedError(f"client {message.client}: step: expected {expected}, got {message}")
            return
        step = 0 if last is None else last.step + 1
        if message.step != step or not message.starts:
            got = f"{message.step}, microbatch {message.microbatch}"
            raise RefusedError(f"client {message.client}: step: expected {step}, got {got}")
        if message.anew and not (self.delta and step == 0):
            raise RefusedError(
                f"client {message.client}: anew: expected in the first step and with delta, got {message}"
            )
        most = self.clients[message.client].batch_size
        both = exchange is Exchange.BOTH
        if message.microbatches != 1 and not (both and 1 < message.microbatches <= message.samples <= most):
            raise RefusedError(
                f"client {message.client}: microbatches: expected 1, or in an A epoch up to the step's samples, at "
                f"most {most}; got {message}"
            )

    def batch(
        self, received: Received, client: int, *, test: bool = False
    ) -> tuple[Encoded, Tensor, Tensor, Tensor | None]:
        """Activations (encoded), ids int64 [B] and labels [B, ...] of a client's training or test batch.

        With delta, the activations are the changes of those samples that the last item, bool [B], says were sent.
        Nothing is decoded before codec, shape and count of each field are known to be right.
        """
        self.check_client(client)
        info = self.clients[client]
        samples = info.test_samples if test else info.samples
        require = partial(_require, client)
        self._check_fields(received.fields, client, test)
        tensors = received.unpack().tensors
        activations = tensors["activations"]
        ids, labels = (get_codec(tensors[name].codec).decode(tensors[name]) for name in NAMES[:2])
        outside = (ids < 0) | (ids >= samples)
        require(not bool(outside.any()), "ids", f"0 to {samples - 1}", some(ids[outside].tolist()))
        sent = None
        if (encoded := tensors.get("sent")) is not None:
            codes = get_codec(encoded.codec).decode(encoded)
            require(bool((codes <= 1).all()), "sent", "0 or 1 for each sample", codes.tolist())
            sent = codes.bool()
            require(len(activations) == int(sent.sum()), "changes", f"{int(sent.sum())}", len(activations))
        self._check_labels(labels, ids, self._label_kinds.get(test), require)
        return activations, ids, labels, sent

    def remember_label_kind(self, labels: Tensor, *, test: bool = False) -> None:
        """These were taken and used: from now on all labels must be of their kind."""
        self._label_kinds.setdefault(test, _kind(labels))

    def knows_labels(self, *, test: bool = False) -> bool:
        """Whether labels have been used."""
        return test in self._label_kinds

    def _check_fields(self, fields: Sequence[Field], client: int, test: bool) -> None:
        """Names, codecs, shapes and counts of a batch's tensors, as the frame's header states them."""
        info, require = self.clients[client], partial(_require, client)
        largest = info.test_batch_size or info.batch_size if test else info.batch_size
        names = NAMES_OF_CHANGES if self.delta and not test else NAMES
        require([field.name for field in fields] == names, "fields", names, [field.name for field in fields])
        by_name = {field.name: field for field in fields}
        activations, count = by_name["activations"], by_name[names[-1]].batch
        require(activations.codec == self.codecs[test], "codec", self.codecs[test], activations.codec)
        require(activations.shape == self.cut_shape, "shape", list(self.cut_shape), list(activations.shape))
        require(0 < count <= largest, "batch size", f"1 to {largest}", count)
        require(activations.batch <= count, "activations", f"at most {count}", activations.batch)
        for name, known in (("ids", [*INTEGER_CODECS]), ("labels", [*INTEGER_CODECS, "fp32"])):
            field = by_name[name]
            require(field.codec in known, f"codec of {name}", known, field.codec)
            require(field.batch == count, name, f"{count} {name}", field.batch)
        require(by_name["ids"].shape == (), "ids", f"{count} ids", [count, *by_name["ids"].shape])
        if names is NAMES_OF_CHANGES:
            sent = by_name["sent"]
            require((sent.codec, sent.shape) == ("u8", ()), "sent", "a byte for each sample", sent.codec)

    def _check_labels(
        self, labels: Tensor, ids: Tensor, first: tuple[bool, tuple[int, ...]] | None, require: Callable[..., None]
    ) -> None:
        floats, shape = _kind(labels)
        floats_first, shape_first = first or (floats, shape)
        got = f"{'floats' if floats else 'integers'} {list(shape)}"
        expected = f"{'floats' if floats_first else 'integers'} {list(shape_first)}"
        require((floats, shape) == (floats_first, shape_first), "labels", expected, got)
        if floats and not isfinite(labels):
            wrong = ~torch.isfinite(labels).reshape(len(labels), -1).all(1)
            require(False, "labels", "finite values", f"infinities or NaN in samples {some(ids[wrong].tolist())}")
        classes = self.classes
        if classes is None:
            return
        one_each = classes.shape in (None, shape)
        expected = f"classes from 0 to {classes.count - 1}" + ("" if classes.shape is None else ", one a sample")
        if floats:
            advice = f"{expected} (integers), or their probabilities (floats {[classes.count]})"
            require(shape == (classes.count,), "labels", advice, f"{got}. {OTHER_TASK}")
            wrong = (labels < 0).any(1) | ((labels.sum(1) - 1).abs() > PROBABILITIES_OFF)
            if bool(wrong.any()):
                found = f"others in samples {some(ids[wrong].tolist())}"
                require(False, "labels", "probabilities, none below 0, that sum to 1", found)
            return
        require(one_each, "labels", expected, got)
        ignored = labels == classes.ignored if classes.ignored is not None else torch.zeros_like(labels).bool()
        wrong = ~ignored & ((labels < 0) | (labels >= classes.count))
        if bool(wrong.any()):
            of = ids.reshape(-1, *(1,) * len(shape)).expand_as(labels)
            pairs = zip(labels[wrong].tolist(), of[wrong].tolist(), strict=True)
            require(False, "labels", expected, some([f"{label} (sample {sample})" for label, sample in pairs]))
        require(not bool(ignored.all()), "labels", expected, f"only {classes.ignored}, which the loss leaves out")


def _require(client: int, ok: bool, field: str, expected: object, got: object) -> None:
    if not ok:
        raise RefusedError(f"client {client}: {field}: expected {expected}, got {got}")


def _kind(labels: Tensor) -> tuple[bool, tuple[int, ...]]:
    """Whether labels are floats, and the shape of one."""
    return labels.is_floating_point(), tuple(labels.shape[1:])
