"""Clients that come to a run that has begun, and clients that leave it for good. Server and clients are threads."""

import copy
import functools
import json
import logging
import shutil
import threading
import time
from pathlib import Path

import grpc
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from cutlayer import Always, Budget, ConfigError, Drop, Fleet, Method, Once, Periodic, fit
from cutlayer.backends.grpc.calls import leave, wait_for_config
from cutlayer.backends.grpc.limits import ClientLimits
from cutlayer.backends.grpc.name_files import Admissions, Revocations
from cutlayer.backends.grpc.rpc import SERVICE, Endpoint
from cutlayer.cli import main
from cutlayer.errors import RefusedError
from cutlayer.records.checkpoint import Checkpoints
from cutlayer.runs.run import Run
from cutlayer.runs.serve import Listening, Served, serve
from cutlayer.strategies import ParallelSplit, Sequential, SplitFedV1
from cutlayer.wire.envelope import seal
from cutlayer.wire.messages import Leave
from tests.helpers import small
from tests.helpers.attacked import CUT, METHOD, NAMES, Attacked, certificates, halves, plan_of, training

BEGUN = ("alice", "bob")
WAITS = "client mallory waits to be admitted"


@pytest.fixture(scope="module")
def tls(tmp_path_factory) -> Path:
    return certificates(tmp_path_factory.mktemp("tls"))


@pytest.fixture(autouse=True)
def logged(caplog) -> None:
    caplog.set_level(logging.INFO)


class Patient(Attacked):
    """Begins to train once it is told to."""

    begin_now = threading.Event()

    def _listens(self, port: int) -> None:
        super()._listens(port)
        self.begin_now.wait(60)


class Growing:
    """A run of alice and bob to which mallory, who means no harm here, is admitted."""

    def __init__(self, folder: Path, tls: Path, caplog, kind: type[Attacked] = Attacked, **more: object) -> None:
        folder.mkdir(exist_ok=True)
        self.folder, self.caplog, self._names = folder, caplog, folder / "admit.txt"
        self._names.write_text("# none yet\n")
        self.admissions = Admissions(self._names)
        chosen = {"patience": None, "epochs": 6, "method": METHOD, **more}
        self.scene = kind(folder, tls, names=BEGUN, all_names=NAMES, admitted=self.admissions, **chosen)

    def __enter__(self) -> "Growing":
        return self

    def __exit__(self, *exc: object) -> None:
        self.scene.__exit__(*exc)

    def expect(self, *names: str) -> None:
        """The operator changes the file, and tells the server."""
        self._names.write_text("\n".join(names))
        self.admissions.reread()

    def admit_after(self, epochs: int) -> None:
        """mallory comes while so many epochs are done, and is there before the next one begins."""
        done = 0

        def count(exchange: str) -> None:
            nonlocal done
            done += 1
            if done == epochs:
                self.come()

        self.scene.watch(count)

    def come(self) -> None:
        before = self.caplog.text.count(WAITS)
        self.expect("mallory")
        self.scene.begin("mallory")
        deadline = time.monotonic() + 30
        while self.caplog.text.count(WAITS) == before:
            assert time.monotonic() < deadline, self.scene.errors
            time.sleep(0.01)

    def weights(self) -> dict[str, torch.Tensor]:
        """Of all halves, at the end."""
        self.scene.end()
        served = self.scene.end()  # also for those that came while the first call waited
        state = {f"server.{name}": value for name, value in served.half.state_dict().items()}
        for name, half in self.scene.joined.items():
            state |= {f"{name}.{key}": value for key, value in half.state_dict().items()}
        return state


def differing(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> list[str]:
    """Names of tensors that are not there, or not the same bits."""
    shared = [name for name in got if name in expected and not torch.equal(got[name], expected[name])]
    return [*sorted(got.keys() ^ expected.keys()), *shared]


def admitted(folder: Path, tls: Path, caplog, after: int = 3, **more: object) -> tuple[dict[str, torch.Tensor], Served]:
    """The run in which mallory is admitted after so many epochs."""
    with Growing(folder, tls, caplog, **more) as growing:
        growing.admit_after(after)
        growing.scene.begin(*BEGUN)
        weights = growing.weights()
        assert growing.scene.served is not None
        return weights, growing.scene.served


# --- what comes of it ---


class Learner:
    """A module with its optimizer, as one writes it."""

    def __init__(self, module: nn.Module) -> None:
        self.module = copy.deepcopy(module)
        self.optimizer = torch.optim.SGD(self.module.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)


def by_hand(sets: list, joins: list[int], epochs: int) -> tuple[nn.Module, nn.Module]:
    """SplitFedV2 as a plain loop: each client takes part from an epoch on, and begins with the others' average."""
    server, mean, clients = Learner(halves().server), copy.deepcopy(halves().client), {}
    for epoch in range(epochs):
        for number, since in enumerate(joins):
            if since == epoch:
                clients[number] = Learner(mean)
        parts = {n: list(zip(*(t.split(8) for t in sets[n].tensors), strict=True)) for n in clients}
        for step in range(max(map(len, parts.values()))):
            for number in (n for n in clients if step < len(parts[n])):
                inputs, labels = parts[number][step]
                loss = cross_entropy(server.module(clients[number].module(inputs)), labels)
                for learner in (server, clients[number]):
                    learner.optimizer.zero_grad()
                loss.backward()
                for learner in (server, clients[number]):
                    learner.optimizer.step()
        total = sum(len(sets[n]) for n in clients)
        states = {n: learner.module.state_dict() for n, learner in clients.items()}
        average = {k: sum(len(sets[n]) / total * states[n][k].double() for n in clients) for k in states[0]}
        for module in (mean, *(learner.module for learner in clients.values())):
            module.load_state_dict(average)
    return mean, server.module


def test_a_client_is_admitted_between_two_epochs_as_in_a_loop_by_hand(tls: Path, tmp_path: Path, caplog) -> None:
    weights, served = admitted(tmp_path, tls, caplog, after=2, method=Method(Always()), epochs=5)
    epochs = served.history.epochs
    assert [record.samples for record in epochs] == [40, 40, 48, 48, 48]
    assert all(record.absent == [] for record in epochs)
    client, server = by_hand(small.data(), [0, 0, 2], 5)
    for name, half in (("alice", client), ("bob", client), ("mallory", client), ("server", server)):
        for key, value in half.state_dict().items():
            torch.testing.assert_close(weights[f"{name}.{key}"], value, rtol=1e-4, atol=1e-6)
    assert caplog.text.count("connected from") - caplog.text.count("disconnected") <= 3
    assert "a new session" not in caplog.text  # nobody's connection was broken for it
    changes = json.loads((tmp_path / "server" / "config.json").read_text())["changes"]
    said = "client mallory was admitted, with 8 samples and 0 test samples; scores count these from then on"
    assert changes == [f"after 2 epochs: {said}"]
    history = Run(tmp_path / "server").history()
    assert history.baseline.samples == 48
    assert history.traffic_reduction == pytest.approx(1, rel=1e-6)  # 32 bits in every epoch


RUNS = {
    "periodic": {"method": METHOD, "keep_checkpoints": 10},
    "views": {"method": Method.of(Periodic(period=3), "fp8", views=2)},
    "delta": {"method": Method.of(Periodic(period=3), "delta>mxfp4+zstd/ef>mxfp4")},
    "splitfed_v1": {"method": Method.of(Periodic(period=3), "fp8", fleet=Fleet(strategy=SplitFedV1(average_every=1)))},
    "sequential": {"method": Method.of(Periodic(period=3), "fp8", fleet=Fleet(strategy=Sequential()))},
    "parallel": {"method": Method.of(Periodic(period=3), "fp8", fleet=Fleet(strategy=ParallelSplit()))},
    "own": {"method": Method.of(Drop(threshold=0.05), "fp8", fleet=Fleet(state="own"))},
    "some": {"method": Method.of(Periodic(period=3), "fp8", fleet=Fleet(fraction=0.5))},
    "norm": {"method": METHOD, "network": small.halves(norm=True)},
}


@pytest.mark.parametrize("name", RUNS)
def test_it_is_the_same_as_a_restart_with_one_client_more(name: str, tls: Path, tmp_path: Path, caplog) -> None:
    """And a run with it is killed and resumed to the same bits, also from a checkpoint from before it was admitted."""
    chosen = RUNS[name]
    live, served = admitted(tmp_path / "live", tls, caplog, **chosen)
    folder = tmp_path / "restarted"
    with Growing(folder, tls, caplog, **chosen) as growing:
        growing.scene.stop_after(3)
        growing.scene.begin(*BEGUN)
        growing.scene.thread.join(60)
    assert not (folder / "server" / "admitted.json").exists()
    Patient.begin_now.clear()
    with Growing(folder, tls, caplog, Patient, **chosen) as growing:
        growing.come()
        Patient.begin_now.set()
        growing.scene.stop_after(5)
        growing.scene.begin(*BEGUN)
        growing.scene.thread.join(60)
    assert json.loads((folder / "server" / "admitted.json").read_text())["clients"][0]["since"] == 3
    checkpoints = Checkpoints(folder / "server" / "checkpoints")
    if name == "periodic":
        assert checkpoints.epochs() == [0, 1, 2, 3, 4, 5]
        for epochs in (3, 4, 5):
            (checkpoints.place(epochs) / "server.safetensors").write_bytes(b"")
    with Growing(folder, tls, caplog, **chosen) as growing:  # which need not be told again
        growing.scene.begin(*NAMES)
        assert differing(growing.weights(), live) == []
        assert growing.scene.served.history.exchanges == served.history.exchanges
        assert growing.scene.served.history.losses == served.history.losses


def test_in_c_epochs_for_good_a_newcomer_sends_once_and_the_others_rest(tls: Path, tmp_path: Path, caplog) -> None:
    _, served = admitted(tmp_path, tls, caplog, after=4, method=Method.of(Once(), "fp8"), epochs=7)
    epochs = served.history.epochs
    assert [record.exchange for record in epochs] == ["A", "B", "C", "C", "B", "C", "C"]
    assert [record.states for record in epochs] == ["", "", "", "", "CCB", "", ""]
    assert [record.samples for record in epochs] == [40, 40, 40, 40, 48, 48, 48]
    rows = sum(record.bytes["up"].get("activations", 0) for record in epochs[4:])
    assert rows == 8 * CUT[0] + 4  # a byte a value, and a scale


# --- who is not admitted changes nothing ---


@functools.cache
def undisturbed(epochs: int = 6) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    result = fit(halves(), small.data()[:2], method=METHOD, training=training(epochs)).halves
    return result.client.state_dict(), result.server.state_dict()


def assert_undisturbed(growing: Growing) -> None:
    weights, (client, server) = growing.weights(), undisturbed()
    expected = {f"server.{key}": value for key, value in server.items()}
    for name in BEGUN:
        expected |= {f"{name}.{key}": value for key, value in client.items()}
    assert differing({name: weights[name] for name in expected}, expected) == []
    assert not (growing.folder / "server" / "admitted.json").exists()
    assert "changes" not in Run(growing.folder / "server").read_config()


def test_who_is_refused_or_dies_before_it_is_admitted_changes_nothing(tls: Path, tmp_path: Path, caplog) -> None:
    limits = ClientLimits(max_samples=100, quotas={"mallory": 50})
    with Growing(tmp_path, tls, caplog, limits=limits) as growing:
        scene, done = growing.scene, threading.Event()

        def attack(exchange: str) -> None:
            if done.is_set():
                return
            done.set()
            honest = scene.hello()
            assert "admits a client to a run that has begun by its name in a file" in scene.refusal(honest)
            growing.expect("mallory")
            wrong = {"samples": 51, "batch_size": 1 << 20, "terms": {**honest.terms, "colour": "red"}, "bfloat16": True}
            for field, value in wrong.items():
                reason = scene.refusal(scene.hello(**{field: value}))
                assert ("colour" if field == "terms" else field) in reason
            assert "give it an empty folder" in scene.refusal(scene.hello(run="other"))
            with pytest.raises(TimeoutError):  # it waits, and is gone before the epoch is at its end
                scene.join("mallory", folder=tmp_path / "dying", stop=Vanishing())
            time.sleep(1.0)

        scene.watch(attack)
        scene.begin(*BEGUN)
        assert_undisturbed(growing)
    assert WAITS in caplog.text


class Vanishing:
    """The end of a process that waits to be let in."""

    requested, saved = False, None

    def __init__(self) -> None:
        self._end = time.monotonic() + 1.0

    def check(self) -> None:
        if time.monotonic() > self._end:
            raise TimeoutError


@pytest.mark.parametrize("megabytes", [0.03, 0.039])
def test_a_newcomer_that_a_budget_does_not_pay_for_is_turned_away(
    megabytes: float, tls: Path, tmp_path: Path, caplog
) -> None:
    """Be it too small for three from the first epoch on, or spent by now."""
    method = Method.of(Budget(megabytes=megabytes), "fp8")
    with Growing(tmp_path, tls, caplog, method=method, epochs=16) as growing:
        scene = growing.scene
        growing.admit_after(14)
        scene.begin(*BEGUN)
        scene.thread.join(60)
        served = scene.served
        assert served is not None
    reason = "do not pay for the first epochs" if megabytes == 0.03 else "what is left of it does not pay for an epoch"
    assert "client mallory cannot be admitted: budget: " in str(scene.errors["mallory"])
    assert reason in str(scene.errors["mallory"])
    undisturbed = {"names": BEGUN, "all_names": NAMES, "patience": None, "method": method, "epochs": 16}
    with Attacked(tmp_path / "undisturbed", tls, **undisturbed) as scene:
        scene.begin(*BEGUN)
        assert scene.end().history.losses == served.history.losses
    assert not (tmp_path / "server" / "admitted.json").exists()


def test_a_newcomer_claims_no_more_of_a_budget_than_its_samples_cost(tls: Path, tmp_path: Path, caplog) -> None:
    """And an honest one is paid for by it: the ledger ends at or below."""
    budget, reasons = 0.07, {}
    with Growing(tmp_path, tls, caplog, method=Method.of(Budget(megabytes=budget), "fp8"), epochs=20) as growing:
        scene, done = growing.scene, []

        def ask(exchange: str) -> None:
            done.append(exchange)
            if len(done) == 2:
                growing.expect("mallory")
                for field in ("epoch_bytes", "epoch_flops", "epoch_forward", "epoch_labels", "epoch_samples"):
                    reasons[field] = scene.refusal(scene.hello(**{field: 20_000}))
                growing.come()

        scene.watch(ask)
        scene.begin(*BEGUN)
        scene.end()
        served = scene.end()
    assert all(f"{field}: expected at most" in reason for field, reason in reasons.items())
    epochs = served.history.epochs
    assert epochs[2].samples == 48
    assert 0.5 * budget * 1e6 < served.history.bytes() <= budget * 1e6
    assert "C" in served.history.exchanges


def test_who_was_admitted_begins_anew_if_the_operator_goes_back_to_before(tls: Path, tmp_path: Path, caplog) -> None:
    """It has its first checkpoint no more, so it is told what to do, and the run goes on with it."""
    chosen = {"method": Method(Always()), "keep_checkpoints": 4}
    with Growing(tmp_path, tls, caplog, **chosen) as growing:
        growing.admit_after(3)
        growing.scene.stop_after(5)
        growing.scene.begin(*BEGUN)
        growing.scene.thread.join(60)
    own = Checkpoints(tmp_path / "mallory" / "checkpoints")
    if 0 in own.epochs():
        shutil.rmtree(own.place(0))
    assert main(["forget", str(tmp_path / "server"), "--client", "bob", "--back-to", "2"]) == 0
    with Growing(tmp_path, tls, caplog, **chosen) as growing:
        scene = growing.scene
        scene.begin("alice")
        with pytest.raises(RefusedError, match=r"after \[[45].*give it an empty folder"):
            scene.join("mallory")
        shutil.rmtree(tmp_path / "mallory")
        scene.begin("mallory")
        assert [record.samples for record in scene.end().history.epochs] == [40, 40, 24, 32, 32, 32]


def test_a_run_of_one_client_takes_in_no_other(tmp_path: Path) -> None:
    names = tmp_path / "admit.txt"
    names.write_text("bob\n")
    listening = Listening("127.0.0.1:0", admitted=Admissions(names))
    with pytest.raises(ConfigError, match="admit: expected a run of two clients or more"):
        serve(halves().server, CUT, listen=listening, run=tmp_path / "run", clients=("alice",))
    assert not (tmp_path / "run").exists()


def test_a_client_that_is_waited_for_and_revoked_is_waited_for_no_more(tls: Path, tmp_path: Path) -> None:
    """It is not even connected."""
    file = tmp_path / "revoked.txt"
    file.write_text("")
    revoked = Revocations(file)
    with Attacked(tmp_path, tls, patience=None, revoked=revoked) as scene:
        session = scene.session()
        scene.begin(*BEGUN)
        session.link.disconnect()
        session.close()
        time.sleep(1.0)
        file.write_text("mallory\n")
        revoked.reread()
        scene.finish(*BEGUN)


# --- who leaves ---


def stored(folder: Path) -> list[bool]:
    """Which samples are in the store of the server's newest checkpoint."""
    newest = Checkpoints(folder / "server" / "checkpoints").latest()
    assert newest is not None
    return np.load(newest / "store" / "present.npy").tolist()


class Scene(Attacked):
    """mallory, honest, leaves at some moment."""

    def leave(self, name: str = "mallory") -> None:
        leave(Endpoint(self.address, self.tls / name))


def test_a_client_leaves_while_it_is_waited_for(tls: Path, tmp_path: Path, caplog) -> None:
    """Its process is stopped in an A epoch, and says a moment later that it does not come back."""
    with Scene(tmp_path, tls, patience=None) as scene:
        scene.begin(*BEGUN)
        session = scene.session()
        plan_of(session)
        session.link.disconnect()
        session.close()
        refusals = []

        def come_back(exchange: str) -> None:
            refusals.append(scene.refusal(scene.hello()))
            with pytest.raises(RefusedError, match="takes part no more"):
                wait_for_config(scene.address, tls / "mallory")

        scene.watch(come_back)
        scene.leave()
        scene.leave()  # again, which changes nothing
        served = scene.finish(*BEGUN)
    assert all("takes part no more: it left the run by itself, after 0 epochs" in refusal for refusal in refusals)
    assert refusals
    assert served.history.given_up["down"] > 0
    assert caplog.text.count("client mallory leaves the run") == 1


@pytest.mark.parametrize("state", ["shared", "own"])
def test_one_that_was_admitted_leaves_in_its_first_epoch(state: str, tls: Path, tmp_path: Path, caplog) -> None:
    """The checkpoint that the server goes back to is of the clients before it."""
    method = Method.of(Once(), "fp8", fleet=Fleet(state=state))
    with Growing(tmp_path, tls, caplog, method=method) as growing:
        scene = growing.scene

        def come_and_go() -> None:
            session = scene.session()  # once it is admitted
            session.link.disconnect()
            session.close()
            leave(Endpoint(scene.address, tls / "mallory"))

        coming = threading.Thread(target=come_and_go, daemon=True)

        def begin(exchange: str) -> None:
            if coming.ident is None:
                growing.expect("mallory")
                coming.start()
                while WAITS not in caplog.text:
                    time.sleep(0.01)

        scene.watch(begin)
        scene.stop_after(4)
        scene.begin(*BEGUN)
        scene.thread.join(60)
    changes = Run(tmp_path / "server").read_config()["changes"]
    assert ["admitted" in change for change in changes] == [True, False]
    with Growing(tmp_path, tls, caplog, method=method) as growing:  # and so it is after a restart
        growing.scene.begin(*BEGUN)
        served = growing.scene.end()
    assert [record.samples for record in served.history.epochs] == [40] * 6


@pytest.mark.parametrize("last", [6, 7])
def test_nothing_stays_of_who_leaves_in_the_last_epoch_or_after_it(last: int, tls: Path, tmp_path: Path) -> None:
    with Scene(tmp_path, tls, patience=None, method=Method.of(Once(), "fp8"), epochs=6) as scene:
        done = []

        def count(exchange: str) -> None:
            done.append(exchange)
            if len(done) == last:
                scene.leave()

        scene.watch(count)
        scene.begin(*BEGUN)
        scene.begin("mallory")
        if last == 7:
            while len(done) < 6:
                time.sleep(0.01)
            scene.leave()
        scene.thread.join(60)
        assert not scene.thread.is_alive()
    assert stored(tmp_path) == [True] * 40 + [False] * 8


@pytest.mark.parametrize("state", ["shared", "own"])
def test_one_that_rests_leaves_between_two_epochs_with_its_samples(
    state: str, tls: Path, tmp_path: Path, caplog
) -> None:
    """And stays away when the server is started again; the last one stays."""
    method = Method.of(Once(), "fp8", fleet=Fleet(state=state))  # A B C C C C
    with Scene(tmp_path, tls, patience=None, method=method, epochs=6) as scene:
        done = []

        def count(exchange: str) -> None:
            done.append(exchange)
            if len(done) == 3:
                scene.leave()

        scene.watch(count)
        scene.stop_after(5)
        scene.begin(*NAMES)
        scene.thread.join(60)
    records = Run(tmp_path / "server").records()
    assert [record.samples for record in records] == [48, 48, 48, 40, 40]
    assert [record.exchange for record in records] == ["A", "B", "C", "C", "C"]
    assert all(record.absent == [] for record in records)
    assert stored(tmp_path) == [True] * 40 + [False] * 8
    with Scene(tmp_path, tls, patience=None, method=method, epochs=6) as scene:
        scene.begin(*BEGUN)
        scene.end()
    assert Run(tmp_path / "server").records()[-1].samples == 40
    said = ["client mallory takes part no more: it left the run by itself, after 3 epochs"]
    assert Run(tmp_path / "server").read_config()["changes"] == said
    assert len(json.loads((tmp_path / "server" / "delivered.json").read_text())) == 2 + 1  # and a checksum


def test_others_cannot_be_made_to_leave_and_the_last_one_stays(tls: Path, tmp_path: Path) -> None:
    with Scene(tmp_path, tls, patience=None, names=BEGUN, all_names=NAMES) as scene:
        with pytest.raises(RefusedError, match="name: expected one of"):
            scene.leave("mallory")
        with scene.channel("mallory") as channel:
            call = channel.unary_unary(f"/{SERVICE}/Leave")
            with pytest.raises(grpc.RpcError, match="made out to 'mallory', the client says 'alice'"):
                call(seal(Leave("alice")), timeout=10)
            with pytest.raises(grpc.RpcError, match="expected a client to leave, got Hello"):
                call(seal(scene.hello("alice")), timeout=10)
        scene.begin("alice")
        time.sleep(0.5)
        with pytest.raises(RefusedError, match="there is no run to leave"):
            scene.leave("bob")
        scene.begin("bob")
        deadline = time.monotonic() + 30
        while not Run(tmp_path / "server").exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        scene.end()
