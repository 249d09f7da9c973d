"""Error feedback: what a codec lost of a sample's gradients is added to its next ones, so nothing is lost for good.

Made for gradients that are sparsified or rounded hard. The memory is the sender's; the receiver decodes as ever.
Sources: Seide et al., "1-Bit Stochastic Gradient Descent and its Application to Data-Parallel Distributed Training of
Speech DNNs", Interspeech 2014; Karimireddy et al., "Error Feedback Fixes SignSGD and other Gradient Compression
Schemes", ICML 2019 (arXiv 1901.09847). There gradients are of weights; here they are of activations, so a residual is
stored for each sample, and added an epoch later.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cutlayer.codecs import Codec, Encoded, get_float_codec
from cutlayer.memory.store import ReplayStore, StoreOptions

# Gradients at the cut are small and widely spread: float16 would lose them below 2^-24.
RESIDUAL = get_float_codec("bf16")


class ErrorFeedback:
    """A sender's memory around a codec: one residual for each sample, in bfloat16.

    Memory: two bytes for each value of each sample, in memory or on disk as `StoreOptions` say.

    Args:
        codec: codec of the gradients.
        samples: ids go from 0 to samples - 1.
        shape: of one sample's gradients.
    """

    def __init__(self, codec: Codec, samples: int, shape: tuple[int, ...], options: StoreOptions) -> None:
        self.codec, self.store = codec, ReplayStore(samples, options, "store of error feedback")
        self.store.check_budget(RESIDUAL.name, shape, sum(RESIDUAL.layout(shape)))

    def encode(self, ids: Tensor, values: Tensor, seed: int = 0) -> Encoded:
        """Encode values [B, *shape] of the samples `ids` (int64 [B]) with what was lost of them before."""
        wanted = values.detach().to(torch.float32)
        if len(self.store):
            wanted = wanted + RESIDUAL.decode(self.store.encoded(ids).to(wanted.device))
        encoded = self.codec.encode(wanted, seed)
        lost = wanted - self.codec.decode(encoded)
        # A value that is not finite is the receiver's to refuse; the memory stays clean of it.
        self.store.put(ids, RESIDUAL.encode(lost.nan_to_num_(0.0, 0.0, 0.0)))
        return encoded
