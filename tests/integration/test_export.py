"""A trained network for use elsewhere: its files, and what they compute."""

import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file

from cutlayer import Run, load_model, run_experiment, with_choices
from cutlayer.cli import main
from cutlayer.codecs import get_codec
from cutlayer.runs.export import load_halves
from cutlayer.runs.predict import predict
from cutlayer.runs.recipes import digits


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("runs") / "run"
    run_experiment(with_choices(digits(), train_samples=400, test_samples=100, epochs=5), folder)
    assert main(["export", str(folder)]) == 0
    return Run(folder)


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return digits().datasets()[1].inputs[:100]


def onnx(file: Path, inputs: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: inputs})[0]


def test_every_form_computes_what_the_model_does(run: Run, images: torch.Tensor) -> None:
    model, folder = load_model(run.folder), run.folder / "export"
    with torch.no_grad():
        expected = model(images)
    weights = load_file(folder / "model.safetensors")
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    program = torch.export.load(folder / "model.pt2").module()
    torch.testing.assert_close(program(images), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(onnx(folder / "model.onnx", images.numpy()), expected.numpy(), rtol=1e-4, atol=1e-4)
    halves = onnx(folder / "server.onnx", onnx(folder / "client.onnx", images.numpy()))
    np.testing.assert_allclose(halves, expected.numpy(), rtol=1e-4, atol=1e-4)
    both = {**load_file(folder / "client.safetensors"), **load_file(folder / "server.safetensors")}
    assert both.keys() == weights.keys()
    assert json.loads((folder / "device.json").read_text())["cut_shape"] == [16, 4, 4]


def test_predictions_are_the_models(
    run: Run, images: torch.Tensor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with torch.no_grad():
        expected = load_model(run)(images)
    np.save(tmp_path / "images.npy", images.numpy())
    call = ["predict", str(run.folder), str(tmp_path / "images.npy")]
    assert main(call) == 0
    assert capsys.readouterr().out.split() == [str(n) for n in expected.argmax(1).tolist()]
    assert main([*call, "--output", str(tmp_path / "out.npy")]) == 0
    np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), expected.numpy())


def test_deployed_halves_lose_what_the_codec_loses(
    run: Run, images: torch.Tensor, capsys: pytest.CaptureFixture[str]
) -> None:
    halves, codec = load_halves(run), get_codec("mxfp4")
    with torch.no_grad():
        expected = halves.server(codec.decode(codec.encode(halves.client(images))))
    assert torch.equal(predict(halves, images, "mxfp4"), expected)
    assert main(["predict", str(run.folder), "--codecs", "fp32", "fp8_e4m3", "mxfp4"]) == 0
    shown = capsys.readouterr().out
    one_piece = f"{run.history().merged['accuracy']:.4f}"
    lines = [line for line in shown.splitlines() if line.startswith("│")]
    assert [line.split("│")[3].strip() for line in lines[:2]] == [one_piece, one_piece]  # uncut, and in 32 bits
    assert len(lines) == 4


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (["predict", "RUN", "nowhere.npy"], "expected a file .npy"),
        (["predict", "RUN", "wrong.npz"], "expected an array 'inputs'"),
        (["predict", "RUN", "wide.npy"], "does not take inputs"),
        (["export", "RUN", "--formats", "tflite"], "expected some of safetensors, onnx, torch"),
        (["export", "nowhere"], "holds no run"),
    ],
)
def test_errors_say_what_to_do(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], call: list[str], said: str
) -> None:
    np.savez(tmp_path / "wrong.npz", images=np.zeros(3))
    np.save(tmp_path / "wide.npy", np.zeros((2, 3, 9), np.float32))
    names = {"RUN": str(run.folder)} | {n: str(tmp_path / n) for n in ("nowhere.npy", "wrong.npz", "wide.npy")}
    assert main([names.get(part, part) for part in call]) == 2
    assert said in capsys.readouterr().err
