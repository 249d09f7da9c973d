"""A client without PyTorch: real processes in which `import torch` fails."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import grpc
import numpy as np
import pytest
import torch

from cutlayer import Run, run_experiment, with_choices
from cutlayer.backends.grpc.certs import make_certificates
from cutlayer.backends.grpc.name_files import Revocations
from cutlayer.backends.grpc.rpc import SERVICE, Endpoint
from cutlayer.backends.grpc.session import open_channel
from cutlayer.cli import main
from cutlayer.data.images import Images
from cutlayer.device.ask import ask
from cutlayer.device.choices import Choices
from cutlayer.device.half import Data, DeviceHalf
from cutlayer.errors import ConfigError, RefusedError
from cutlayer.runs.answer import REQUESTS, Answers
from cutlayer.runs.export import load_halves
from cutlayer.runs.fit import fit
from cutlayer.runs.predict import predict, samples_of
from cutlayer.runs.recipes import digits
from tests.helpers.processes import Process, port_of

TOLERANCE = 1e-5
"""Of activations from onnxruntime, relative to the largest of PyTorch's."""

# Whoever imports PyTorch in such a process fails as on a machine that has none.
WITHOUT_TORCH = """
import sys
class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise ModuleNotFoundError("No module named 'torch'", name="torch")
sys.meta_path.insert(0, NoTorch())
try:
    import torch
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("torch can be imported")
from cutlayer.device.__main__ import main
code = main(sys.argv[1:])
assert not any(name == "torch" or name.startswith("torch.") for name in sys.modules)
sys.exit(code)
"""


def device(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", WITHOUT_TORCH, *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)


def save(file: Path, images: Images) -> Path:
    np.savez(file, inputs=images.inputs.numpy(), labels=images.labels.numpy())
    return file


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run with its export, and the data as a device has them."""
    folder = tmp_path_factory.mktemp("device")
    config = with_choices(digits(), train_samples=300, test_samples=80, epochs=6, schedule="always")
    run_experiment(config, folder / "run")
    assert main(["export", str(folder / "run"), "--formats", "onnx"]) == 0
    train, test = config.datasets()
    save(folder / "train.npz", train)
    save(folder / "test.npz", test)
    return folder


SERVED = ["--train-samples", "300", "--test-samples", "80", "--epochs", "4", "--threads", "1"]


def serve(folder: Path, *more: str) -> Process:
    where = ["--listen", "127.0.0.1:0", "--run-dir", folder / "served"]
    return Process("serve", "digits", *where, *SERVED, *more)


def join(trained: Path, port: int, folder: Path) -> subprocess.CompletedProcess:
    export = ["--half", trained / "run" / "export", "--data", trained / "train.npz", "--test", trained / "test.npz"]
    return device("join", f"127.0.0.1:{port}", *export, "--run-dir", folder / "device", "--threads", "1")


def test_activations_are_pytorchs_within_the_tolerance(trained: Path) -> None:
    half, images = DeviceHalf(trained / "run" / "export"), Data.load(trained / "test.npz")
    with torch.no_grad():
        expected = load_halves(Run(trained / "run")).client(torch.from_numpy(images.inputs)).numpy()
    assert np.abs(half(images.inputs) - expected).max() <= TOLERANCE * np.abs(expected).max()


def test_a_device_takes_part_in_the_b_epochs_of_a_run(trained: Path, tmp_path: Path) -> None:
    with serve(tmp_path, "--frozen", "--schedule", "periodic", "--period", "3") as server:
        done = join(trained, port_of(server), tmp_path)
        assert (done.returncode, done.stderr) == (0, "")
        assert server.wait() == 0, server.output
    assert done.stdout.split("\n")[:2] == ["epoch 1: B", "epoch 2: B"]
    history = Run(tmp_path / "served").history()
    assert history.exchanges == "BBCB"
    assert history.bytes("down", ["gradients"]) == 0
    assert history.losses[-1] < 0.9 * history.losses[0]
    # As a client with PyTorch and the same frozen half in its place; activations differ in their last bits.
    config = with_choices(
        digits(), train_samples=300, test_samples=80, epochs=4, schedule="periodic", period=3, threads=1
    )
    train, test = config.datasets()
    halves = config.halves(train)
    halves.client.load_state_dict(load_halves(Run(trained / "run")).client.state_dict())
    halves.client.requires_grad_(False)
    same = fit(halves, train, test, method=config.method, training=config.training).history
    np.testing.assert_allclose(history.losses, same.losses, rtol=0.02)
    assert history.bytes("up", ["activations", "labels"]) == same.bytes("up", ["activations", "labels"])
    assert history.baseline == same.baseline
    assert history.flops("client") == same.flops("client")


def test_a_epochs_are_refused_with_the_reason(trained: Path, tmp_path: Path) -> None:
    with serve(tmp_path, "--schedule", "always") as server:
        done = join(trained, port_of(server), tmp_path)
    assert done.returncode == 2
    assert "an A epoch trains the client half, which a device without PyTorch cannot do" in done.stderr
    assert "--frozen" in done.stderr


def test_another_cut_or_codec_needs_the_users_consent_and_noise_needs_pytorch(trained: Path, tmp_path: Path) -> None:
    for options, said in (
        (["--codec", "fp32"], "codec of the activations"),
        (["--cut", "layer2"], "shape at the cut"),
        (["--defence.noise", "0.5"], "sends its activations without noise"),
    ):
        with serve(tmp_path, "--frozen", *options) as server:
            done = join(trained, port_of(server), tmp_path)
        assert done.returncode == 2
        assert said in done.stderr


@pytest.mark.parametrize("codec", ["fp8_e4m3", "mxfp4", "int4+zstd"])
def test_split_inference(trained: Path, codec: str) -> None:
    run = trained / "run"
    with Process("answer", run, "--listen", "127.0.0.1:0", "--codec", codec) as server:
        port = server.wait_for(r"answering on port (\d+)")[1]
        out = trained / "out.npy"
        call = ["--half", run / "export", "--data", trained / "test.npz", "--codec", codec, "--output", out]
        done = device("predict", f"127.0.0.1:{port}", *call)
        assert (done.returncode, done.stderr) == (0, "")
    data = Data.load(trained / "test.npz")
    expected = predict(load_halves(Run(run)), torch.from_numpy(data.inputs), codec, batch_size=64)
    got = torch.from_numpy(np.load(out))
    # A value on the edge between two codes may fall to either side.
    assert (got - expected).abs().median() <= 1e-4 * expected.abs().max()
    assert float((got.argmax(1) == expected.argmax(1)).float().mean()) > 0.97
    accuracy = float((expected.argmax(1).numpy() == data.labels).mean())
    assert abs(float(done.stdout.split()[-1]) - accuracy) < 0.03


def test_what_does_not_fit_is_not_answered(trained: Path) -> None:
    run = trained / "run"
    halves = load_halves(Run(run))
    answers = Answers(halves.server, (16, 4, 4), "fp8_e4m3", "127.0.0.1:0")
    try:
        half, data, address = DeviceHalf(run / "export"), Data.load(trained / "test.npz"), f"127.0.0.1:{answers.port}"
        assert ask(address, half, data).shape == (80, 10)
        with pytest.raises(RefusedError, match=r"expected 1 to 1024 samples in fp8_e4m3.*got 64 in mxfp4"):
            ask(address, half, data, codec="mxfp4")
        for request in (b"", b"CUTL", os.urandom(200)):
            with pytest.raises(RefusedError):
                answers.answer(request)
    finally:
        answers.close()


def test_a_batch_may_be_larger_than_a_chunk(trained: Path) -> None:
    """A MiB of activations in a request, and as much of outputs."""
    run = trained / "run"
    answers = Answers(torch.nn.Flatten(), (16, 4, 4), "fp32", "127.0.0.1:0")
    try:
        half, small = DeviceHalf(run / "export"), Data.load(trained / "test.npz")
        data = Data(np.tile(small.inputs, (13, 1, 1, 1))[:1024], None)
        outputs = ask(f"127.0.0.1:{answers.port}", half, data, codec="fp32", batch_size=1024)
        assert np.abs(outputs - half(data.inputs).reshape(1024, -1)).max() < 1e-5
    finally:
        answers.close()


def test_who_asks_and_sends_nothing_keeps_no_one_from_an_answer(trained: Path) -> None:
    run = trained / "run"
    answers = Answers(load_halves(Run(run)).server, (16, 4, 4), "fp8_e4m3", "127.0.0.1:0")
    answers.request_seconds, address = 1.0, f"127.0.0.1:{answers.port}"
    silent = threading.Event()
    try:
        with open_channel(address, None) as channel:
            call = channel.stream_stream(f"/{SERVICE}/Predict")
            hanging = [call(iter(silent.wait, True)) for _ in range(REQUESTS)]
            assert ask(address, DeviceHalf(run / "export"), Data.load(trained / "test.npz")).shape == (80, 10)
            assert all(each.code() is grpc.StatusCode.CANCELLED for each in hanging)
    finally:
        silent.set()
        answers.close()


def test_one_certificate_has_a_share_of_the_requests_and_counts_until_it_is_revoked(
    trained: Path, tmp_path: Path
) -> None:
    run, tls, revoked = trained / "run", tmp_path / "tls", tmp_path / "revoked"
    make_certificates(tls, ["alice", "eve"])
    revoked.write_text("")
    names = Revocations(revoked)
    here = Endpoint("127.0.0.1:0", tls / "server")
    answers = Answers(load_halves(Run(run)).server, (16, 4, 4), "fp8_e4m3", here, names)
    half, data, address = DeviceHalf(run / "export"), Data.load(trained / "test.npz"), f"127.0.0.1:{answers.port}"
    silent = threading.Event()
    try:
        with open_channel(address, tls / "eve") as channel:
            call = channel.stream_stream(f"/{SERVICE}/Predict")
            hanging = [call(iter(silent.wait, True)) for _ in range(REQUESTS)]
            with pytest.raises(RefusedError, match="eve: expected at most 4 requests at a time"):
                ask(Endpoint(address, tls / "eve"), half, data)
            assert ask(Endpoint(address, tls / "alice"), half, data).shape == (80, 10)
            for each in hanging:
                each.cancel()
        revoked.write_text("alice\n")
        names.reread()
        with pytest.raises(RefusedError, match="revoked"):
            ask(Endpoint(address, tls / "alice"), half, data)
    finally:
        silent.set()
        answers.close()


def test_a_device_waits_for_a_server_only_so_long(trained: Path, tmp_path: Path) -> None:
    export = ["--half", trained / "run" / "export", "--data", trained / "train.npz", "--run-dir", tmp_path]
    done = device("join", "127.0.0.1:1", *export, "--give-up-after", "0.5")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: no connection to 127.0.0.1:1")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("name", "value"), [("batch_size", 0), ("batch_size", "8"), ("shuffle", 1), ("seed", None)])
def test_what_no_server_says_is_refused(trained: Path, name: str, value: object) -> None:
    half = DeviceHalf(trained / "run" / "export")
    config = Run(trained / "run").read_config()["config"]
    training = {**config["training"], "augment": None}
    good = {**config, "training": training, "terms": {}}
    assert Choices.checked(good, half).batch_size == training["batch_size"]
    with pytest.raises(ConfigError, match="not of this version"):
        Choices.checked({**good, "training": {**training, name: value}}, half)
    with pytest.raises(ConfigError, match="not of this version"):
        Choices.checked({**good, "terms": ["client half"]}, half)


@pytest.mark.parametrize("damage", ["cut short", "changed"])
def test_damaged_arrays_are_named(tmp_path: Path, damage: str) -> None:
    file = tmp_path / "data.npz"
    np.savez(file, inputs=np.arange(64.0))
    content = bytearray(file.read_bytes())
    if damage == "cut short":
        content = content[: len(content) // 2]
    else:
        content[300] ^= 255
    file.write_bytes(bytes(content))
    for load in (samples_of, lambda each: Data.load(each, labelled=False)):
        with pytest.raises(ConfigError, match=r"data\.npz"):
            load(file)


def test_errors_are_one_line(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "device.json").write_text(json.dumps({"format": "other"}))
    np.savez(tmp_path / "wide.npz", inputs=np.zeros((2, 3), np.float32), labels=np.zeros(2, np.int64))
    export = trained / "run" / "export"
    for half, data, said in (
        (tmp_path, trained / "train.npz", "expected 'cutlayer device 1'"),
        (export, tmp_path / "nowhere.npz", "expected a file .npz"),
        (export, tmp_path / "wide.npz", "expected inputs uint8 [1, 8, 8], got float32 [3]"),
    ):
        done = device("join", "127.0.0.1:1", "--half", half, "--data", data, "--run-dir", tmp_path / "device")
        assert done.returncode == 2
        assert done.stderr.startswith("error: ")
        assert done.stderr.count("\n") == 1
        assert said in done.stderr
