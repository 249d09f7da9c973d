"""The commands `cutlayer export` and `cutlayer predict`: a run's network, used."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from cutlayer.codecs import evaluation_codec, get_transfer
from cutlayer.method import accuracy
from cutlayer.report.units import human_bytes
from cutlayer.runs.config import RunConfig
from cutlayer.runs.export import FORMATS, load_halves
from cutlayer.runs.export import export as export_run
from cutlayer.runs.predict import BATCH, Samples, predict, samples_of
from cutlayer.runs.run import Run


@dataclasses.dataclass(frozen=True)
class ExportArguments:
    """Write a recipe's network and both halves, trained: safetensors, ONNX, and torch.export's .pt2."""

    run: tyro.conf.Positional[str]
    """Folder of the run."""
    output: str | None = None
    """Folder to write to; by default export in the run's folder."""
    formats: tuple[str, ...] = FORMATS
    """What to write: safetensors, onnx, torch."""
    client: str | None = None
    """Folder of the client, for a run that was served to one client."""
    best: bool = False
    """The best epoch's weights, of a run with --keep-best, in place of the last one's."""


@dataclasses.dataclass(frozen=True)
class PredictArguments:
    """Outputs of a run's network on data; with labels its accuracy; with codecs that of its halves apart, too."""

    run: tyro.conf.Positional[str]
    """Folder of the run."""
    data: tyro.conf.Positional[str | None] = None
    """File .npy with inputs, or .npz with inputs and labels; by default the run's test data."""
    codecs: tuple[str, ...] = ()
    """Codecs to send the activations at the cut in, as a device would, such as fp8_e4m3 mxfp4: the accuracy of each."""
    data_dir: str | None = None
    """Folder with the files of the run's data set."""
    client: str | None = None
    """Folder of the client, for a run that was served to one client."""
    best: bool = False
    """The best epoch's weights, of a run with --keep-best, in place of the last one's."""
    output: str | None = None
    """File .npy to write the outputs [N, ...] to."""


def export(arguments: Sequence[str], console: Console) -> None:
    """Write a run's network and halves for use elsewhere: safetensors, ONNX, torch.export."""
    chosen = tyro.cli(ExportArguments, prog="cutlayer export", args=arguments)
    run = Run(chosen.run)
    folder = Path(chosen.output) if chosen.output is not None else run.folder / "export"
    found = export_run(run, folder, formats=chosen.formats, best=chosen.best, client=chosen.client)
    for file in found.files:
        checked = f" (onnxruntime within {found.differences[file.stem]:.1e})" if file.suffix == ".onnx" else ""
        console.print(f"wrote {file}, {human_bytes(file.stat().st_size)}{checked}", soft_wrap=True)


def predict_command(arguments: Sequence[str], console: Console) -> None:
    """Put data through a run's network; say how often it is right, also with the activations sent in few bits."""
    chosen = tyro.cli(PredictArguments, prog="cutlayer predict", args=arguments)
    run = Run(chosen.run)
    halves = load_halves(run, best=chosen.best, client=chosen.client)
    samples = samples_of(chosen.data) if chosen.data is not None else _test_data(run, chosen.data_dir)
    outputs = predict(halves, samples.inputs)
    if chosen.output is not None:
        with Path(chosen.output).open("wb") as file:
            np.save(file, outputs.numpy())
        console.print(f"wrote {chosen.output}: {list(outputs.shape)}", soft_wrap=True)
    if samples.labels is None:
        if chosen.output is None:
            classes = outputs.argmax(1).tolist()
            console.print(" ".join(map(str, classes)), soft_wrap=True)
        return
    table = Table("activations sent in", "bytes a sample", f"accuracy of {len(samples.labels)}")
    table.add_row("not sent: one piece", "", f"{float(accuracy(outputs, samples.labels)):.4f}")
    shape = halves.client(samples.inputs[:1]).shape[1:]
    for spec in chosen.codecs:
        codec = evaluation_codec(get_transfer(spec))
        layout = codec.layout(tuple(shape))
        score = float(accuracy(predict(halves, samples.inputs, spec), samples.labels))
        table.add_row(codec.name, f"{layout.row_bytes + layout.shared_bytes / BATCH:.0f}", f"{score:.4f}")
    console.print(table)


def _test_data(run: Run, folder: str | None) -> Samples:
    data = RunConfig.from_dict(run.read_config()["config"]).data
    _, test = (data if folder is None else dataclasses.replace(data, folder=folder)).load()
    return Samples(test.inputs, test.labels)
