"""One conformance test, run by every backend: the same seed and config give the same bits and the same costs."""

from pathlib import Path

import pytest

from cutlayer.backends.grpc.certs import make_certificates
from cutlayer.backends.ray import Ray
from cutlayer.regularize import Regularize
from cutlayer.runs.run import Run
from tests.helpers import processes
from tests.helpers.processes import join, port_of, run_in_process, serve

# Those on Ray share a cluster with the other tests of Ray, and so a process.
pytestmark = pytest.mark.xdist_group("ray")


def run_over_grpc(folder: Path, **changes: object) -> tuple[dict, list[dict], str]:
    make_certificates(folder / "tls", ["client"])
    with serve(folder, **changes) as server, join(folder, port_of(server)) as client:
        assert client.wait() == 0, client.output
        assert server.wait() == 0, server.output
    found = processes.records(folder / "server")
    model = Run(folder / "server").model(client=folder / "client")
    weights = {name: tensor.numpy().tobytes() for name, tensor in model.state_dict().items()}
    return weights, found, str(Run(folder / "server").history().baseline)


def run_on_ray(folder: Path, **changes: object) -> tuple[dict, list[dict], str]:
    return run_in_process(folder, Ray(), **changes)


BACKENDS = {"in process": run_in_process, "grpc": run_over_grpc, "ray": run_on_ray}


CHOICES: dict[str, dict[str, object]] = {
    **{codec: {"codec": codec} for codec in ("fp8", "fp32", "delta0.2>mxfp4+zstd/ef>topk0.2>fp8_e5m2")},
    "bf16, channels last": {"precision": "bf16", "channels_last": True},
}


FEW = {
    **{"schedule": "settle", "both_epochs": 2, "activation_epochs": 2, "last_exchange": 0.6, "averaged_updates": 0.7},
    **{"views": 2, "views_from": 1, "narrow": 2, "padding": 2},
    "regularize": Regularize(mixup=0.3, cutmix=1.0, label_smoothing=0.1, dropout=0.1, channel_dropout=0.1),
}
"""All that is for few exchanges."""


@pytest.fixture(scope="module")
def expected(tmp_path_factory) -> dict[str, tuple]:
    """What the first backend gives, by choices."""
    return {name: run_in_process(tmp_path_factory.mktemp("run"), **given) for name, given in CHOICES.items()}


class TestConformance:
    @pytest.mark.parametrize("backend", BACKENDS)
    @pytest.mark.parametrize("name", CHOICES)
    def test_same_weights_losses_and_bytes(self, backend: str, name: str, expected, tmp_path: Path, request) -> None:
        if backend == "ray":
            request.getfixturevalue("cluster")
        weights, records, baseline = BACKENDS[backend](tmp_path, **CHOICES[name])
        assert "".join(record["exchange"] for record in records) == "ABCCABCC"
        assert weights == expected[name][0]
        assert records == expected[name][1]
        assert baseline == expected[name][2]

    @pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "in process"])
    def test_few_exchanges_are_alike(self, backend: str, tmp_path: Path, request) -> None:
        expected = run_in_process(tmp_path / "expected", **FEW)
        if backend == "ray":
            request.getfixturevalue("cluster")
        assert BACKENDS[backend](tmp_path, **FEW) == expected
        assert "".join(record["exchange"] for record in expected[1]) == "AABCCBCC"
