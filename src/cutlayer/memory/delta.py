"""Delta: what crosses is the change of a sample's activations since the last time.

Client and server store a reference m of every training sample, in float16, with the same bits. The client encodes the
change a - m, and both move on to m' = float16(m + the decoded change); the server trains on m'. What one sending lost
is part of the next change, so references close in on activations that settle. Without a reference m is 0. A sample
that has one, and whose change is at most `tolerance` times its norm, is not sent: m' = m.

The server's references are its replay store. Once an epoch it tells a digest of them; a client whose own differ lets go
of all references, on both sides, and so sends everything in full.

Sources: Wang et al., "Fine-tuning Language Models over Slow Networks using Activation Quantization with Guarantees"
(AQ-SGD, NeurIPS 2022, arXiv 2206.01299); samples that are not sent: Li et al., "SplitCom" (arXiv 2602.10564).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from cutlayer.codecs import Codec, Encoded, get_float_codec
from cutlayer.memory.store import ReplayStore, StoreOptions

REFERENCE = get_float_codec("fp16")

log = logging.getLogger("cutlayer.client")


def references(store: ReplayStore, ids: Tensor, like: Tensor) -> Tensor:
    """References of the samples `ids`, float32 [B, *shape] on the device of `like` [..., *shape]; 0 if none is."""
    if len(store) == 0:
        return torch.zeros((len(ids), *like.shape[1:]), device=like.device)
    return REFERENCE.decode(store.encoded(ids).to(like.device))


def moved(before: Tensor, sent: Tensor, changes: Tensor) -> Encoded:
    """The references that follow, the same bits on both sides.

    Args:
        before: references float32 [B, *shape], written to.
        sent: bool [B], which samples were sent.
        changes: float32 [n, *shape], the decoded changes of these n.
    """
    before[sent] += changes
    return REFERENCE.encode(before)


class DeltaSender:
    """The client's side: its references, and what it sends.

    Memory: two bytes for each value of each training sample, in memory or on disk as `StoreOptions` say.

    Args:
        codec: of the changes.
        tolerance: relative change up to which a sample is not sent; with 0 only one that has not changed at all is not.
        samples: ids go from 0 to samples - 1.
        shape: of one sample's activations.
    """

    def __init__(
        self, codec: Codec, tolerance: float, samples: int, shape: tuple[int, ...], options: StoreOptions
    ) -> None:
        self.codec, self.tolerance = codec, tolerance
        self.store = ReferenceStore(samples, options, "store of the client's references")
        self.store.check_budget(REFERENCE.name, shape, sum(REFERENCE.layout(shape)))

    def encode(self, ids: Tensor, activations: Tensor, seed: int = 0) -> tuple[Tensor, Encoded]:
        """Which samples are sent, bool [B], and their encoded changes; `seed` as in `Codec.encode`.

        Args:
            ids: int64 [B].
            activations: finite, [B, *shape].
        """
        activations = activations.detach().to(torch.float32)
        before = references(self.store, ids, activations)
        change = activations - before
        rows = len(ids), -1
        still = change.reshape(rows).norm(dim=1) <= self.tolerance * activations.reshape(rows).norm(dim=1)
        sent = ~(still & self.store.present(ids).to(still.device))
        encoded = self.codec.encode(change[sent], seed)
        self.store.put(ids, moved(before, sent, self.codec.decode(encoded)))
        return sent, encoded

    def agree(self, digest: int | None) -> bool:
        """Whether the server's references, by their digest, are these; if not, these are let go of."""
        if digest == self.store.digest(0, self.store.capacity):
            return True
        log.warning("references differ from the server's: all activations of this epoch are sent in full")
        self.store.clear(0, self.store.capacity)
        return False


class ReferenceStore(ReplayStore):
    """References in a checkpoint can be done without: if they cannot be read, everything is sent in full."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """As `ReplayStore.load_state_dict`; empty if that fails."""
        try:
            super().load_state_dict(state)
        except (OSError, EOFError, ValueError, KeyError) as error:
            log.warning("references in the checkpoint cannot be read (%s)", error)
            self.clear(0, self.capacity)
            self.version = state["version"] + 1
