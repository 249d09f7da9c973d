"""Error feedback: what a codec lost of one tensor is added to the next, so that nothing is lost for good.

Made for gradients that are sparsified or rounded hard. The memory is held here, by the sender, outside the codec: the
receiver decodes as ever. Source: Seide et al., "1-Bit Stochastic Gradient Descent and its Application to Data-Parallel
Distributed Training of Speech DNNs", Interspeech 2014; Karimireddy et al., "Error Feedback Fixes SignSGD and other
Gradient Compression Schemes", ICML 2019 (arXiv 1901.09847).
"""

from __future__ import annotations

import torch
from torch import Tensor

from cutlayer.errors import ConfigError
from cutlayer.formats.base import Codec, Encoded


class ErrorFeedback:
    """A sender's memory around a codec: one residual for each sample of a data set, by sample id.

    The gradient of a sample's activations at the cut is compared with that of the same sample an epoch later, so the
    residual is kept by sample. Memory: `samples` times the size of a sample in float32.

    Args:
        codec: codec of the gradients.
        samples: ids go from 0 to samples - 1.
        decay: what a residual is multiplied with before it is added, from 0 (no feedback) to 1.
    """

    def __init__(self, codec: Codec, samples: int, decay: float = 1.0) -> None:
        if not 0 <= decay <= 1:
            raise ConfigError(f"decay of the error feedback: expected a number from 0 to 1, got {decay}")
        self.codec, self.samples, self.decay = codec, samples, decay
        self.residuals: Tensor | None = None

    def encode(self, ids: Tensor, values: Tensor, seed: int = 0) -> Encoded:
        """Encode values [B, *shape] of the samples `ids` (int64 [B], different) with what was lost of them before."""
        values = values.detach().to(torch.float32)
        if self.residuals is None:
            self.residuals = torch.zeros((self.samples, *values.shape[1:]), device=values.device)
        if self.residuals.shape[1:] != values.shape[1:]:
            raise ConfigError(
                f"error feedback: expected samples of shape {list(self.residuals.shape[1:])}, "
                f"got {list(values.shape[1:])}"
            )
        wanted = self.residuals[ids].mul_(self.decay).add_(values)
        encoded = self.codec.encode(wanted, seed)
        lost = wanted.sub_(self.codec.decode(encoded))
        # A value that is not finite is the receiver's to refuse; the memory stays clean of it.
        self.residuals[ids] = lost.nan_to_num_(0.0, 0.0, 0.0)
        return encoded

    def state(self) -> dict[str, Tensor]:
        """The memory as tensors, for a checkpoint; empty before the first `encode`."""
        return {} if self.residuals is None else {"residuals": self.residuals}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take over what `state` returned."""
        residuals = state.get("residuals")
        if residuals is not None and len(residuals) != self.samples:
            raise ConfigError(f"error feedback: expected the state of {self.samples} samples, got {len(residuals)}")
        self.residuals = None if residuals is None else residuals.clone()
