"""A member or a stranger that lies, stalls or floods: the honest finish in the bits of a run without it."""

import contextlib
import copy
import itertools
import json
import shutil
import socket
import ssl
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import TensorDataset

from cutlayer import ConfigError, Method, Periodic, RefusedError, files, fit
from cutlayer.backends.grpc.calls import check_health, fetch_config
from cutlayer.backends.grpc.certs import make_certificates
from cutlayer.backends.grpc.health import READINESS
from cutlayer.backends.grpc.limits import ClientLimits
from cutlayer.backends.grpc.link import CHUNK, CHUNK_BYTES, CONFIRM, MORE
from cutlayer.backends.grpc.name_files import Revocations
from cutlayer.cli.entry import main
from cutlayer.codecs import Encoded, encode_exactly, get_codec
from cutlayer.runs.serve import Callbacks, Served, Waits, serve
from cutlayer.stop_request import Stop, Stopped
from cutlayer.wire.frames import MAGIC, PREFIX, VERSION, Frame, pack
from cutlayer.wire.messages import Done, Plan
from tests.helpers.attacked import (
    CUT,
    NAMES,
    SAMPLES,
    Attacked,
    certificates,
    forget_peak,
    memory_mib,
    plan_of,
    refused,
    step,
)
from tests.helpers.small import data, halves, training

SMALL = ClientLimits(max_samples=100)


@pytest.fixture(scope="module")
def tls(tmp_path_factory) -> Path:
    return certificates(tmp_path_factory.mktemp("tls"))


# --- what is claimed, and what a refused Hello changes ---

CLAIMS = {
    "samples": 1 << 28,
    "test_samples": 1 << 28,
    "batch_size": 1 << 20,
    "test_batch_size": 1 << 20,
    "epoch_samples": 1 << 62,
    "epoch_steps": 1 << 27,
    "epoch_flops": (1 << 63) - 1,
    "epoch_bytes": 1 << 61,
    "half_bytes": 1 << 30,
    "weights_bytes": 1 << 30,
}


def test_claims_are_bounded_and_refused_hellos_change_nothing(tls: Path, tmp_path: Path) -> None:
    with Attacked(tmp_path, tls, patience=None, limits=SMALL) as scene:
        scene.refusal(scene.hello(samples=0))
        before = forget_peak()
        for field, value in CLAIMS.items():
            assert f"{field}: expected at most" in scene.refusal(scene.hello(**{field: value}))
        honest = scene.hello()
        reason = scene.refusal(scene.hello(terms={**honest.terms, "colour": "red"}))
        assert "colour: expected None, got red" in reason
        assert memory_mib() - before < 50
        scene.begin(*NAMES)
        scene.finish(*NAMES)


def test_what_is_stored_of_a_client_fits_its_share(tls: Path, tmp_path: Path) -> None:
    limits = ClientLimits(max_samples=1 << 40, quotas={"mallory": 1 << 38})
    with Attacked(tmp_path, tls, patience=None, limits=limits) as scene:
        reason = scene.refusal(scene.hello(samples=1 << 37, epoch_samples=8))
        assert "this client's share of 65536 MiB" in reason
        scene.begin(*NAMES)
        scene.finish(*NAMES)


def test_a_copy_of_a_device_without_its_folder_breaks_no_epoch_off(tls: Path, tmp_path: Path) -> None:
    """In the midst of an A epoch, which mallory's device holds up."""
    with Attacked(tmp_path, tls, patience=None, keepalive=1.0) as scene:
        scene.begin("alice", "bob")
        session = scene.session()
        plan_of(session)
        session.link.disconnect()  # so that the copy is not refused for the connection that is up
        session.close()
        scene.hello()
        reason = ""
        while "checkpoint: expected one" not in reason:
            reason = scene.refusal(scene.hello(checkpoints=(7,), run="other"))
        assert scene.served is None
        scene.begin("mallory")
        assert scene.finish(*NAMES).refusals["mallory"] >= 1


# --- frames that are far more than they seem ---


def bomb(name: str, codec: str, shape: tuple[int, ...], batch: int = 8) -> bytes:
    """A step of mallory's in epoch 0 of which one tensor says that it is far more than its bytes."""
    made = get_codec(codec).encode(torch.zeros(1, *shape))
    rows = torch.zeros(batch, made.rows.shape[1], dtype=torch.uint8)
    return step(Plan(2, 0, "A"), **{name: Encoded(codec, shape, rows, made.shared)})


def test_nothing_is_decoded_before_codec_shape_and_count_are_those_of_the_run(tls: Path, tmp_path: Path) -> None:
    many = dict.fromkeys(("ids", "labels"), encode_exactly(torch.arange(4096)))
    bombs = {
        "codec: expected fp8_e4m3, got fp8_e4m3+zstd": bomb("activations", "fp8_e4m3+zstd", (1 << 18,)),
        "codec: expected fp8_e4m3, got topk0.001>fp8_e4m3": bomb("activations", "topk0.001>fp8_e4m3", (1 << 20,), 1),
        "shape: expected": bomb("activations", "fp8_e4m3", (4096,)),
        "batch size: expected 1 to 8, got 4096": step(Plan(2, 0, "A"), activations=tensor_of(4096), **many),
        "codec of labels: expected": bomb("labels", "fp16+zstd", (1 << 18,)),
        "codec of ids: expected": bomb("ids", "fp32", ()),
    }
    with Attacked(tmp_path, tls) as scene:
        scene.begin("alice", "bob")
        session = scene.session()
        plan_of(session)
        before = forget_peak()
        for expected, reason in zip(bombs, refused(session, bombs.values()), strict=True):
            assert expected in reason
        assert memory_mib() - before < 50
        session.close()
        scene.finish("alice", "bob")


def tensor_of(count: int) -> Encoded:
    return get_codec("fp8_e4m3").encode(torch.zeros(count, 8))


def test_frames_in_crumbs_are_refused_and_cost_no_memory(tls: Path, tmp_path: Path) -> None:
    with Attacked(tmp_path, tls) as scene:
        scene.begin("alice", "bob")
        prefix = PREFIX.pack(MAGIC, VERSION, 100, 10000)
        with pytest.raises(Exception, match="bytes in all chunks but the last, got 17"):
            scene.say(pack(Frame(scene.hello())), CHUNK.pack(MORE, 0, 0) + prefix)
        scene.session().close()
        scene.finish("alice", "bob")


# --- who stalls ---


def stall_with(scene: Attacked, messages: Iterator[bytes]) -> None:
    """mallory's device begins a session and sends one of these every tenth of a second, over one connection."""

    def outgoing() -> Iterator[bytes]:
        yield pack(Frame(scene.hello()))
        for message in messages:
            yield message
            time.sleep(0.1)

    def stall() -> None:
        with scene.channel() as channel, contextlib.suppress(grpc.RpcError):
            for _ in scene.exchange(channel)(outgoing()):
                pass

    scene.hello()
    threading.Thread(target=stall, daemon=True).start()


@pytest.mark.parametrize("what", ["silence", "confirmations", "a frame that never ends"])
def test_a_client_that_only_seems_to_live_is_late_all_the_same(what: str, tls: Path, tmp_path: Path) -> None:
    beginning = CHUNK.pack(MORE, 0, 0) + PREFIX.pack(MAGIC, VERSION, 0, 2_000_000)
    first = {"a frame that never ends": beginning.ljust(CHUNK.size + CHUNK_BYTES, b"x"), "silence": CHUNK.pack(2, 0, 0)}
    still = itertools.repeat(CHUNK.pack(CONFIRM, 0, 0), 0 if what == "silence" else 1000)
    with Attacked(tmp_path, tls, limits=ClientLimits(slowest=1 << 20)) as scene:
        scene.begin("alice", "bob")
        began = time.monotonic()
        stall_with(scene, itertools.chain([first.get(what, CHUNK.pack(CONFIRM, 0, 0))], still))
        scene.finish("alice", "bob")
        assert time.monotonic() - began < 30


def test_done_after_no_step_neither_ends_the_run_nor_sends_it_back(tls: Path, tmp_path: Path) -> None:
    with Attacked(tmp_path, tls) as scene:
        scene.begin("alice", "bob")
        session = scene.session()
        plan = plan_of(session)
        (reason,) = refused(session, [pack(Frame(Done(plan.client, plan.epoch, 0, {})))])
        assert "expected at least one step of epoch 0" in reason
        session.close()
        scene.finish("alice", "bob")


# --- poison ---


def check_left_out(served: Served, folder: Path, log: str) -> None:
    assert "client mallory is left out from now on" in log
    assert all(torch.isfinite(value).all() for value in served.half.state_dict().values())
    assert json.loads((folder / "server/left_out.json").read_text())["mallory"].startswith("training diverged")


def test_who_makes_training_diverge_is_left_out(tls: Path, tmp_path: Path, caplog) -> None:
    """Activations that are finite and huge, at the beginning: the others' run is as if it had never been."""
    huge = get_codec("fp8_e4m3").encode(torch.full((SAMPLES["mallory"], *CUT), 1e30))
    with Attacked(tmp_path, tls, patience=None) as scene:
        scene.begin("alice", "bob")
        session = scene.session()
        session.link.send(step(plan_of(session), activations=huge))
        assert session.link.wait_closed(30)
        session.close()
        check_left_out(scene.finish("alice", "bob"), tmp_path, caplog.text)


def test_who_turns_later_is_left_out_after_the_way_back(tls: Path, tmp_path: Path, caplog) -> None:
    """In the B epoch; the A epoch before was honest, and stays."""
    with Attacked(tmp_path, tls, patience=None) as scene:
        scene.begin("alice", "bob")
        half = copy.deepcopy(scene.half)
        half.register_forward_hook(lambda half, inputs, out: out if torch.is_grad_enabled() else out * 1e30)
        with pytest.raises(RefusedError, match="client mallory takes part no more: training diverged"):
            scene.join("mallory", half)
        served = scene.end()
        check_left_out(served, tmp_path, caplog.text)
        assert [record.absent for record in served.history.epochs if record.exchange != "C"] == [[], [2], [2]]


def test_samples_of_which_the_loss_leaves_all_labels_out_do_not_fill_c_batches() -> None:
    """Of three batches that each have one label that counts; a shuffle of all would make one of none."""
    (whole,) = data((24,))
    labels = torch.full((24,), -100)
    labels[::8] = whole.tensors[1][::8]
    method = Method.of(Periodic(period=4), "fp8")
    result = fit(halves(), TensorDataset(whole.tensors[0], labels), method=method, training=training(8))
    assert all(0 < loss < 10 for loss in result.history.losses)


def test_forget_takes_a_client_out_of_a_run(tls: Path, tmp_path: Path, capsys) -> None:
    with Attacked(tmp_path, tls, patience=None, epochs=4) as scene:
        scene.stop_after(2)
        scene.begin(*NAMES)
        scene.thread.join(30)
    assert main(["forget", str(tmp_path / "server"), "--client", "nobody"]) == 2
    assert main(["forget", str(tmp_path / "server"), "--client", "mallory", "--back-to", "9"]) == 2
    assert main(["forget", str(tmp_path / "server"), "--client", "mallory"]) == 0
    with Attacked(tmp_path, tls, patience=None, epochs=4) as scene:
        assert "mallory takes part no more: left out with `cutlayer forget`" in scene.refusal(scene.hello())
        scene.begin("alice", "bob")
        served = scene.end()
    assert [record.samples for record in served.history.epochs] == [48, 48, 40, 40]
    assert not np.load(tmp_path / "server/checkpoints/epoch-000004/store/present.npy")[40:].any()


# --- strangers, and two that are one ---


def test_strangers_take_up_their_own_places_alone(tls: Path, tmp_path: Path) -> None:
    before = server_threads()
    with Attacked(tmp_path, tls, patience=None) as scene, contextlib.ExitStack() as stack:
        held = [stack.enter_context(socket.create_connection(("127.0.0.1", scene.port))) for _ in range(200)]
        assert len(held) == 200
        silent = threading.Event()
        stack.callback(silent.set)
        refusals = 0
        for name in ("eve", "mallory"):
            channel = stack.enter_context(scene.channel(name))
            calls = [scene.exchange(channel)(wait_for(silent)) for _ in range(12)]
            deadline = time.monotonic() + 20
            # A stream over its connection's limit waits on the client's own side; of the others few stay.
            while refusals < 2 and time.monotonic() < deadline:
                refusals = sum(call.is_active() is False for call in calls)
                time.sleep(0.05)
            for call in calls[::2]:
                call.cancel()
        for _ in range(100):
            with contextlib.suppress(grpc.RpcError):
                scene.exchange(channel)(wait_for(silent)).cancel()
        assert check_health(scene.address, tls / "alice") == "SERVING"
        assert server_threads() - before < 30
        assert not any(isinstance(thread, threading.Timer) for thread in threading.enumerate())
        silent.set()
        scene.begin(*NAMES)
        scene.finish(*NAMES)


def server_threads() -> int:
    own = ("cutlayer-stream", "cutlayer-read", "cutlayer-deadlines")
    return sum(thread.name.startswith(own) for thread in threading.enumerate())


def wait_for(event: threading.Event) -> Iterator[bytes]:
    event.wait(30)
    yield b""


def test_the_second_of_two_processes_with_one_certificate_is_refused(tls: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(files, "LOCK_PATIENCE", 0.2)
    with Attacked(tmp_path, tls, patience=None, keepalive=0.5) as scene:
        scene.begin("alice", "bob")
        scene.wait_until_there("alice")
        with pytest.raises(ConfigError, match="another process is at work on this client's folder"):
            scene.join("alice")
        with pytest.raises(RefusedError, match="client alice is connected already, from another process"):
            scene.join("alice", folder=tmp_path / "elsewhere")
        scene.begin("mallory")
        assert scene.finish(*NAMES).history.given_up == {}


# --- the end, certificates, readiness ---


def test_who_was_away_at_the_end_gets_its_half_later(tls: Path, tmp_path: Path) -> None:
    """Its device is stopped after its first epoch; the run ends without it, and so does the server."""
    with Attacked(tmp_path, tls) as scene:
        scene.begin("alice", "bob")
        stop = Stop()
        with pytest.raises(Stopped):
            scene.join("mallory", stop=stop, on_epoch=lambda exchange, epoch: stop.request())
        served = scene.end()
    assert sorted(json.loads((tmp_path / "server/delivered.json").read_text())) == ["alice", "bob", "checksum"]
    with Attacked(tmp_path, tls, waits=Waits(linger=None)) as scene:
        half = scene.join("mallory")
        scene.thread.join(30)
        assert not scene.thread.is_alive()
    shared = load_file(tmp_path / "server/client.safetensors")
    assert all(torch.equal(value, shared[name]) for name, value in half.state_dict().items())
    assert served.history.epochs[-1].absent == [2]


def test_farewell_is_for_runs_that_are_at_their_end(tmp_path: Path, capsys) -> None:
    assert main(["serve", "digits", "--run-dir", str(tmp_path), "--farewell"]) == 2
    assert "is not at its end, 0 epochs are done" in capsys.readouterr().err


def test_readiness_says_who_is_waited_for_and_liveness_does_not(tls: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("cutlayer.backends.grpc.waiting.SOON", 0.1)
    with Attacked(tmp_path, tls, patience=None) as scene:
        scene.begin("alice", "bob")
        waits = "NOT_SERVING, waiting for mallory"
        deadline = time.monotonic() + 30
        while (ready := check_health(scene.address, tls / "alice", READINESS)) != waits:
            assert time.monotonic() < deadline, ready
            time.sleep(0.1)
        assert check_health(scene.address, tls / "alice") == "SERVING"
        scene.begin("mallory")
        scene.finish(*NAMES)


def test_a_renewed_certificate_is_shown_without_an_end_of_the_server(tmp_path: Path) -> None:
    tls = certificates(tmp_path / "tls")
    with Attacked(tmp_path / "run", tls, patience=None) as scene:
        first = shown(scene.port, tls)
        shutil.rmtree(tls / "server")
        assert check_health(scene.address, tls / "alice") == "SERVING"  # with those that it has
        make_certificates(tls, [])
        assert shown(scene.port, tls) != first
        (tls / "server/own.crt").write_text("garbage")
        assert check_health(scene.address, tls / "alice") == "SERVING"


def shown(port: int, tls: Path) -> bytes:
    """The certificate that a server shows to alice."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(tls / "alice/ca.crt")
    context.load_cert_chain(tls / "alice/own.crt", tls / "alice/own.key")
    context.set_alpn_protocols(["h2"])
    name = "cutlayer-server"
    with (
        socket.create_connection(("127.0.0.1", port)) as plain,
        context.wrap_socket(plain, server_hostname=name) as secured,
    ):
        return secured.getpeercert(binary_form=True) or b""


def test_each_client_is_named_once(tls: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected each name once, got client, client"):
        serve(halves().server, CUT, listen="127.0.0.1:0", run=tmp_path, clients=["client", "client"])


# --- operations ---


def test_a_second_server_in_the_folder_is_refused_before_anyone_can_connect(tmp_path: Path, tls, monkeypatch) -> None:
    monkeypatch.setattr("cutlayer.files.LOCK_PATIENCE", 0.2)

    def content() -> dict[Path, bytes]:
        return {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}

    with Attacked(tmp_path, tls, patience=None) as scene:
        before, ports = content(), []
        callbacks = Callbacks(on_listening=ports.append)
        with pytest.raises(ConfigError, match="another process is at work on this run"):
            serve(halves().server, CUT, listen="127.0.0.1:0", run=tmp_path / "server", callbacks=callbacks)
        assert (ports, content()) == ([], before)
        scene.begin(*NAMES)
        scene.finish(*NAMES)


def test_a_revoked_client_is_out_from_that_moment_and_the_others_finish(tls: Path, tmp_path: Path) -> None:
    """In the midst of an epoch that its device holds up."""
    file = tmp_path / "revoked.txt"
    file.write_text("# nobody yet\n")
    revoked = Revocations(file)
    with Attacked(tmp_path, tls, patience=None, revoked=revoked) as scene:
        scene.begin("alice", "bob")
        session = scene.session()
        plan_of(session)
        file.write_text("mallory\n")
        revoked.reread()
        assert session.link.wait_closed(30)
        session.close()
        assert "revoked its certificate" in scene.refusal(scene.hello())
        with pytest.raises(grpc.RpcError, match="takes part no more"):
            fetch_config(scene.address, tls / "mallory")
        scene.finish("alice", "bob")


def test_metrics_tell_of_epochs_bytes_refusals_and_who_is_there(tls: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    texts = []

    def look(line: str) -> None:
        with contextlib.suppress(OSError):
            texts.append(urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5).read().decode())

    with Attacked(tmp_path, tls, patience=None, metrics=f"127.0.0.1:{port}") as scene:
        look("before anyone has come")
        assert 'cutlayer_client_present{client="alice"} 0.0' in texts[-1]
        scene.refusal(scene.hello(samples=1 << 28))
        scene.watch(look)
        scene.begin(*NAMES)
        scene.finish(*NAMES)
    found = dict(line.rsplit(" ", 1) for line in texts[-1].splitlines() if not line.startswith("#"))
    assert found['cutlayer_epochs_total{exchange="A"}'] == "2.0"
    assert found['cutlayer_refusals_total{client="mallory",reason="samples"}'] == "1.0"
    assert float(found['cutlayer_client_bytes_total{client="bob",direction="up"}']) > 500
    assert float(found["cutlayer_store_bytes"]) > 48 * 8
    assert found['cutlayer_client_present{client="alice"}'] == "1.0"
    assert 0 < float(found["cutlayer_loss"]) < 10
