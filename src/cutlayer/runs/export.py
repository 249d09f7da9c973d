"""A run's network for use elsewhere: safetensors, ONNX, `torch.export`; whole and in halves."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cutlayer.backends.grpc.terms import terms_of
from cutlayer.codecs import evaluation_codec, get_transfer
from cutlayer.data.images import Images
from cutlayer.durable import replace
from cutlayer.errors import ConfigError
from cutlayer.files import save_sealed
from cutlayer.models.cut import Halves
from cutlayer.models.flops import FlopTable
from cutlayer.runs.config import RunConfig
from cutlayer.runs.run import Run
from cutlayer.runs.weights import load_into, network_of
from cutlayer.stopping import Best
from cutlayer.training.averaging import largest_weights, weights_frame
from cutlayer.wire.messages import Weights

FORMATS = ("safetensors", "onnx", "torch")
TOLERANCE = 1e-4
"""Largest difference between onnxruntime's outputs and PyTorch's, relative to the largest output."""


def load_model(run: str | Path | Run, *, best: bool | Best = False, client: str | Path | None = None) -> nn.Module:
    """The uncut network of a recipe's run, trained as far as it is, in eval mode; for others see `Run.model`."""
    return (run if isinstance(run, Run) else Run(run)).model(best=best, client=client)


def load_halves(run: Run, *, best: bool = False, client: str | Path | None = None) -> Halves:
    """Both halves of a recipe's run with their trained weights, in eval mode."""
    halves = network_of(run.read_config()["config"], run.folder)
    load_into(halves, run.model(halves, best=best, client=client).state_dict())
    halves.client.eval()
    halves.server.eval()
    return halves


@dataclass(frozen=True)
class Exported:
    """What was written, and by how much onnxruntime's outputs differ from PyTorch's, relative to the largest output."""

    files: tuple[Path, ...]
    differences: dict[str, float]


def export(
    run: Run,
    folder: Path,
    *,
    formats: Sequence[str] = FORMATS,
    best: bool = False,
    client: str | Path | None = None,
) -> Exported:
    """Write a recipe's network and both halves, and what a device without PyTorch needs beside its ONNX half.

    Args:
        folder: to write to.
        formats: of `FORMATS`.
        best, client: as in `Run.model`.

    Raises:
        ConfigError: the run has no weights yet, a package is missing, or onnxruntime computes something else.
    """
    if strange := [name for name in formats if name not in FORMATS]:
        raise ConfigError(f"formats: expected some of {', '.join(FORMATS)}, got {', '.join(strange)}")
    halves, written = load_halves(run, best=best, client=client), []
    config = RunConfig.from_dict(run.read_config()["config"])
    outline = config.data.outline()
    inputs = _examples(outline)
    with torch.no_grad():
        activations = halves.client(inputs)
    parts = {
        "model": (halves.merged(), inputs),
        "client": (halves.client, inputs),
        "server": (halves.server, activations),
    }
    folder.mkdir(parents=True, exist_ok=True)
    differences = {}
    for name, (module, example) in parts.items():
        if "safetensors" in formats:
            written.append(folder / f"{name}.safetensors")
            save_sealed(module.state_dict(), written[-1])
        if "torch" in formats:
            written.append(folder / f"{name}.pt2")
            torch.export.save(torch.export.export(module, (example,), dynamic_shapes=_dynamic()), written[-1])
        if "onnx" in formats:
            written.append(folder / f"{name}.onnx")
            differences[name] = to_onnx(module, example, written[-1])
    if "onnx" in formats:
        written.append(folder / "device.json")
        replace(written[-1], json.dumps(device_facts(config, halves, outline), indent=2) + "\n")
    return Exported(tuple(written), differences)


def to_onnx(module: nn.Module, example: Tensor, file: Path) -> float:
    """Write a module as ONNX, with any batch size; return onnxruntime's difference. Raises ConfigError above 1e-4."""
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  (which PyTorch's exporter needs)
    except ModuleNotFoundError as error:
        raise ConfigError(f"ONNX needs {error.name}: pip install 'cutlayer[export]'") from None
    with _quiet():
        program = torch.onnx.export(
            module,
            (example,),
            dynamo=True,
            dynamic_shapes=_dynamic(),
            input_names=["inputs"],
            output_names=["outputs"],
            verbose=False,
        )
        assert program is not None
        program.save(str(file), external_data=False)
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    difference = 0.0
    with torch.no_grad():
        for batch in (example, example[:1], example.repeat(3, *[1] * (example.dim() - 1))):
            expected = module(batch).numpy()
            got = session.run(None, {name: batch.numpy()})[0]
            difference = max(difference, float(np.abs(got - expected).max() / max(np.abs(expected).max(), 1e-12)))
    if not difference <= TOLERANCE:
        raise ConfigError(
            f"{file}: onnxruntime's outputs differ from PyTorch's by {difference:.2g}, relative; not usable"
        )
    return difference


def device_facts(config: RunConfig, halves: Halves, outline: Images) -> dict[str, Any]:
    """What a device needs to know beside its ONNX half: the terms of the run, sizes and FLOPs."""
    shape, dtype = tuple(outline.inputs.shape[1:]), outline.inputs.dtype
    table = FlopTable(halves.client, shape, dtype)
    method, training = config.method, config.training
    transfer = get_transfer(method.activations)
    return {
        "format": "cutlayer device 1",
        "inputs": {"shape": list(shape), "type": str(dtype).removeprefix("torch.")},
        "cut_shape": list(table.output_shape),
        "codec": transfer.name,
        "evaluation_codec": evaluation_codec(transfer).name,
        "norm_in_b": method.norm_in_b,
        "batch_size": training.batch_size,
        "seed": training.seed,
        "shuffle": training.shuffle,
        "drop_last": training.drop_last,
        "augment": training.augment is not None,
        "data": config.data.name,
        "flops": table(1)[0],
        "weights_bytes": len(weights_frame(Weights(0, 1), halves.client.state_dict())),
        "half_bytes": largest_weights(halves.client),
        "terms": terms_of(method, training, table.output_shape, halves.client),
    }


def _examples(outline: Images) -> Tensor:
    """Inputs to export with: of the data's shape and type, all of them different."""
    shape = (4, *outline.inputs.shape[1:])
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def _dynamic() -> tuple[dict[int, Any]]:
    return ({0: torch.export.Dim("batch")},)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporter says of its own workings."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)
