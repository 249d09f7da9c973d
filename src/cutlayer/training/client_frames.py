"""The frames that a client makes of its activations, and the gradients that it reads from the server's."""

from __future__ import annotations

import torch
from torch import Tensor

from cutlayer.codecs import encode_exactly, evaluation_codec, get_transfer, isfinite
from cutlayer.data.batches import Batch, not_finite
from cutlayer.errors import DivergedError, RefusedError
from cutlayer.memory.delta import DeltaSender
from cutlayer.records.ledger import Ledger
from cutlayer.seeds import derive
from cutlayer.training.job import ClientJob
from cutlayer.wire.frames import Frame, Received, pack
from cutlayer.wire.messages import Evaluate, Step, Update


def microbatch_name(message: Step | Evaluate) -> tuple[int, ...]:
    """What a microbatch adds to the name of a random draw; nothing if a batch is whole."""
    return (message.microbatch,) if isinstance(message, Step) and message.microbatches > 1 else ()


class ClientFrames:
    """A client's codecs at work.

    Attributes:
        deltas: the references, if changes of activations are sent.
    """

    def __init__(self, job: ClientJob, cut_shape: tuple[int, ...], ledger: Ledger) -> None:
        transfer, method = get_transfer(job.method.activations), job.method
        self.number, self.seed, self.cut_shape, self.ledger = job.number, job.training.seed, cut_shape, ledger
        self.device = torch.device(job.training.device)
        self.codec, self.test_codec = transfer.codec, evaluation_codec(transfer)
        self.gradient_codec = get_transfer(method.gradients).codec
        self.deltas = None
        if transfer.delta is not None:
            self.deltas = DeltaSender(self.codec, transfer.delta, len(job.train), cut_shape, method.store)

    def activations(self, message: Step | Evaluate, batch: Batch, activations: Tensor) -> bytes:
        """A frame of a batch's ids, labels and activations. Raises DivergedError if some are not finite."""
        with self.ledger.phase("encode"):
            if not isfinite(activations):
                what = "evaluation after epoch" if isinstance(message, Evaluate) else "epoch"
                place = f"client {self.number}, {what} {message.epoch}, step {message.step}"
                raise DivergedError(f"{place}: {not_finite(batch, activations, isinstance(message, Evaluate))}")
            activations = activations.detach().float().contiguous()
            name = ("encode", "up", self.number, message.epoch, message.step, *microbatch_name(message))
            seed = derive(self.seed, *name)
            tensors = {"ids": encode_exactly(batch.ids), "labels": encode_exactly(batch.labels)}
            if isinstance(message, Evaluate):
                tensors["activations"] = self.test_codec.encode(activations)
            elif self.deltas is None:
                tensors["activations"] = self.codec.encode(activations, seed)
            else:
                sent, tensors["activations"] = self.deltas.encode(batch.ids, activations, seed)
                tensors["sent"] = encode_exactly(sent.to(torch.uint8))
            return pack(Frame(message, tensors))

    def gradients(self, received: Received, message: Step, count: int) -> Tensor:
        """The gradients [count, *cut] in the answer to a step. Raises RefusedError if it is none."""
        expected = Update(self.number, message.epoch, message.step, message.microbatch)
        if received.message != expected or [field.name for field in received.fields] != ["gradients"]:
            raise RefusedError(
                f"client {self.number}: expected the gradients of epoch {message.epoch}, step {message.step}, "
                f"microbatch {message.microbatch}, got {received.message}"
            )
        (field,), codec = received.fields, self.gradient_codec
        if (field.codec, field.batch, field.shape) != (codec.name, count, self.cut_shape):
            raise RefusedError(
                f"client {self.number}: expected gradients in {codec.name} of shape {[count, *self.cut_shape]}, got "
                f"{field.codec} of shape {[field.batch, *field.shape]}"
            )
        encoded = received.unpack().tensors["gradients"]
        with self.ledger.phase("decode"):
            gradients = codec.decode(encoded.to(self.device))
            if not isfinite(gradients):
                raise RefusedError(f"client {self.number}: gradients: expected finite values, got infinities or NaN")
        return gradients
