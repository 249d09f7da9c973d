"""The exported client half on a device: an ONNX file, what is known of it, and the data that go through it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from cutlayer.device.encode import DeviceCodec, integers
from cutlayer.errors import ConfigError
from cutlayer.wire.envelope import Field, seal
from cutlayer.wire.messages import Message

FORMAT = "cutlayer device 1"


@dataclass(frozen=True, eq=False)
class Data:
    """Samples on a device: inputs [N, ...], and labels int64 [N] if there are any."""

    inputs: NDArray
    labels: NDArray[np.int64] | None

    @staticmethod
    def load(file: str | Path, *, labelled: bool = True) -> Data:
        """From an .npz file with `inputs` and `labels`, or an .npy file with inputs. Raises ConfigError."""
        try:
            content = np.load(file, allow_pickle=False)
            named = {"inputs": content} if isinstance(content, np.ndarray) else dict(content)
        except (OSError, ValueError, EOFError, BadZipFile) as error:
            raise ConfigError(f"data: expected a file .npz with inputs and labels, {file}: {error}") from None
        labels = named.get("labels")
        if (
            "inputs" not in named
            or (labelled and labels is None)
            or named["inputs"].ndim < 1
            or not len(named["inputs"])
        ):
            raise ConfigError(f"{file}: expected arrays inputs and labels, there are {', '.join(named) or 'none'}")
        if labels is not None and (
            labels.ndim < 1 or len(labels) != len(named["inputs"]) or labels.dtype.kind not in "iu"
        ):
            raise ConfigError(f"{file}: expected a whole number as the label of each of {len(named['inputs'])} inputs")
        return Data(named["inputs"], None if labels is None else labels.astype(np.int64))

    def __len__(self) -> int:
        return len(self.inputs)


class DeviceHalf:
    """The client half of an export.

    Args:
        folder: where `cutlayer export` wrote client.onnx and device.json.
        threads: of onnxruntime.

    Attributes:
        facts: the content of device.json.
        cut_shape: of one sample's activations.
    """

    def __init__(self, folder: str | Path, threads: int = 0) -> None:
        file = Path(folder) / "device.json"
        try:
            self.facts: dict[str, Any] = json.loads(file.read_text())
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"{folder}: expected the folder of `cutlayer export`, with device.json: {error}"
            ) from None
        if self.facts.get("format") != FORMAT:
            raise ConfigError(f"{file}: expected {FORMAT!r}, got {self.facts.get('format')!r}; export it again")
        self.cut_shape = tuple(self.facts["cut_shape"])
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self._session = onnxruntime.InferenceSession(
            str(Path(folder) / "client.onnx"), options, providers=["CPUExecutionProvider"]
        )
        self._input = self._session.get_inputs()[0].name

    def check(self, data: Data) -> None:
        """Raise ConfigError for inputs that this half does not take."""
        wanted = self.facts["inputs"]
        got = {"shape": list(data.inputs.shape[1:]), "type": str(data.inputs.dtype)}
        if got != wanted:
            raise ConfigError(
                f"data: expected inputs {wanted['type']} {wanted['shape']}, got {got['type']} {got['shape']}"
            )

    def __call__(self, inputs: NDArray) -> NDArray[np.float32]:
        """The activations of a batch, float32 [B, *cut_shape]."""
        return np.asarray(self._session.run(None, {self._input: inputs})[0], np.float32)


def frame(
    message: Message,
    ids: NDArray[np.int64] | None,
    labels: NDArray[np.int64] | None,
    activations: NDArray,
    codec: DeviceCodec,
) -> bytes:
    """A frame of a batch, as `training.client_frames` makes it."""
    fields: list[Field] = []
    buffers: list[bytes | memoryview] = []
    for name, values in (("ids", ids), ("labels", labels)):
        if values is not None:
            kind, content = integers(values)
            fields.append(Field(name, kind, len(values), tuple(values.shape[1:]), len(content)))
            buffers.append(content)
    packed = codec.pack(activations)
    size = sum(map(len, packed))
    fields.append(Field("activations", codec.name, len(activations), tuple(activations.shape[1:]), size))
    return seal(message, tuple(fields), [*buffers, *packed])


def batches(order: NDArray[np.int64], size: int, drop_last: bool) -> Sequence[NDArray[np.int64]]:
    """The ids of each batch."""
    parts = [order[start : start + size] for start in range(0, len(order), size)]
    return parts[:-1] if drop_last and len(parts[-1]) < size else parts
