"""What a server can do to a client, and what the client's policy does not let it do."""

import dataclasses
import json
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

from cutlayer import Always, Method, RefusedError
from cutlayer.backends.grpc.policy import OWN_HALF, Policy
from cutlayer.cli.entry import main
from cutlayer.data.datasets import digits as load_digits
from cutlayer.errors import harmless
from cutlayer.models.cut import split
from cutlayer.runs.choices import with_choices
from cutlayer.runs.join import join
from cutlayer.runs.recipes import digits
from cutlayer.training.averaging import weights_frame
from cutlayer.wire.messages import Finished, Plan, Weights
from tests.helpers.bad_server import BadServer, bad_server
from tests.helpers.small import data, halves, training

METHOD = Method.of(Always(), "fp8")


def take_part(server: BadServer, folder: Path, policy: Policy = OWN_HALF) -> None:
    client = halves().client
    join(server.address, client, data()[0], folder=folder, method=METHOD, training=training(9), policy=policy)


def test_finished_at_once_is_not_success(tmp_path: Path) -> None:
    with bad_server() as server:
        server.send(Finished())
        with pytest.raises(RefusedError, match="there is nothing to deliver"):
            take_part(server, tmp_path)
    assert not (tmp_path / "client.safetensors").exists()


def test_weights_in_the_midst_of_an_epoch_are_refused(tmp_path: Path) -> None:
    with bad_server() as server:
        server.send(Plan(0, 0, "A"))
        server.link.send(weights_frame(Weights(0, 0), halves().client.state_dict()))
        with pytest.raises(RefusedError, match="weights before or after an epoch, or those that it waits for"):
            take_part(server, tmp_path)


@pytest.mark.parametrize(
    ("policy", "reason"),
    [
        ({"checkpoints": 3}, "checkpoints: this client stores 4"),
        ({"views": 2}, "views: this client lets a sample's activations leave 2 times"),
        ({"weights": False}, "weights: this client's policy"),
        ({"labels": False}, "labels: this client's policy does not let them leave"),
        ({"codecs": ("int4",)}, "codec of the activations: this client accepts int4, the run has fp8_e4m3"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_client_keeps_to_its_policy_and_names_the_rule(policy: dict, reason: str, tmp_path: Path) -> None:
    def serve(server: BadServer) -> None:
        for epoch in range(6):
            server.send(Plan(0, epoch, "B", share=0 if "weights" in policy else None))
            server.until_done()

    with bad_server() as server:
        threading.Thread(target=lambda: quietly(serve, server), daemon=True).start()
        with pytest.raises(RefusedError, match=reason):
            take_part(server, tmp_path, dataclasses.replace(OWN_HALF, **policy))


def quietly(call, *arguments) -> None:
    try:
        call(*arguments)
    except Exception:
        return


# --- what is taken from a server's config, and who is asked ---

CONFIG = with_choices(digits(), train_samples=64, test_samples=8, epochs=2, threads=1)


def offered(**changes: object) -> str:
    values = CONFIG.as_dict()
    for path, value in changes.items():
        *parents, name = path.split("__")
        place = values
        for parent in parents:
            place = place[parent]
        place[name] = value
    return json.dumps(values)


@pytest.mark.parametrize(
    ("config", "status", "reason"),
    [
        (offered(threads=100000), 1, "threads: this client takes at most"),
        (offered(model__width=1e9), 1, "width: this client takes at most 4.0, the server asks for 1000000000.0"),
        (offered(model__client_width=5), 1, "client_width: this client takes at most 4.0, the server asks for 5"),
        (offered(training__batch_size=1 << 40), 1, "batch_size: this client takes at most 4096"),
        (offered(model__cut="[/x]\x1b[31m"), 2, "[/x]"),
        (offered(method__activations="fp32"), 1, "exact: 256 values of 32 bits a sample cross the cut"),
        (offered(), 2, "say --accept-cut layer3"),
    ],
    ids=["threads", "width", "client width", "batch", "markup", "exact", "nobody is asked"],
)
def test_the_join_command_refuses_and_ends_in_order(
    config: str, status: int, reason: str, tmp_path: Path, capsys, monkeypatch
) -> None:
    monkeypatch.setattr("sys.stdin", NoTerminal())
    with bad_server(config) as server:
        assert main(["join", server.address, "--run-dir", str(tmp_path)]) == status
    said = capsys.readouterr()
    assert reason in said.out + said.err
    assert "\x1b" not in said.out + said.err
    if "accept-cut" in reason:
        assert "activations at the cut: [16, 4, 4] for each sample of shape [1, 8, 8], in fp8_e4m3" in said.out
        assert "labels: yes" in said.out


class NoTerminal:
    def isatty(self) -> bool:
        return False


def test_what_a_peer_says_moves_no_cursor_and_forges_no_line() -> None:
    said = harmless("fine\n2026-01-01 server: all is well\x1b[2J\u202e\x00" + "x" * 5000)
    assert said.isprintable()
    assert said.startswith("fine\\n2026")
    assert len(said) < 1200


# --- exact: what the rule is for ---


def test_a_wide_first_layer_in_32_bits_gives_the_pixels_away_and_is_refused() -> None:
    """Batch norm in eval mode: the layer is affine, and what is above 0 is an equation in the pixels."""
    images = load_digits()[0].inputs[:8].float() / 16
    torch.manual_seed(0)
    first = nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()
    network = nn.Sequential(*first, nn.Flatten(), nn.Linear(1024, 10))
    half = split(network, "2").client.eval()
    seen = half(images).detach()

    def affine(inputs: torch.Tensor) -> torch.Tensor:
        return network[1].eval()(network[0](inputs))

    offset = affine(torch.zeros(1, 1, 8, 8)).flatten().detach()
    rows = affine(torch.eye(64).reshape(64, 1, 8, 8)).flatten(1).T.detach() - offset[:, None]
    for image, values in zip(images, seen.flatten(1), strict=True):
        known = values > 0
        solved = torch.linalg.lstsq(rows[known], (values - offset)[known, None], driver="gelsd").solution[:, 0]
        assert (solved - image.flatten()).abs().max() < 1e-3
    with pytest.raises(RefusedError, match="exact: 1024 values of 32 bits a sample cross the cut, its input has 64"):
        Policy().check_cut(Method.of(Always(), "fp32"), (16, 8, 8), (1, 8, 8))
    Policy().check_cut(METHOD, (16, 8, 8), (1, 8, 8))
    Policy().check_cut(Method.of(Always(), "fp32"), (4, 2, 2), (1, 8, 8))
