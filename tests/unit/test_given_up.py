"""Bytes of epochs that an interruption undid: in the ledger, apart from those of the epochs that count."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from cutlayer import ConfigError, Halves, History, Periodic, Run, Training, fit
from cutlayer.backends.base import TrustedClients
from cutlayer.backends.local import LOCAL, Local, LocalPeer
from cutlayer.errors import StateLostError
from cutlayer.method import Method
from cutlayer.report import comparison
from cutlayer.runs.loop import train_epoch

METHOD = Method(Periodic(period=2))


def halves() -> Halves:
    torch.manual_seed(0)
    return Halves(nn.Linear(6, 8), nn.Linear(8, 3))


def data() -> TensorDataset:
    draw = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randn(32, 6, generator=draw), torch.randint(0, 3, (32,), generator=draw))


def training(**more: int) -> Training:
    return Training(epochs=5, batch_size=8, **more)


def crossed(history: History, *epochs: int) -> dict[str, int]:
    """Bytes of these epochs by direction, evaluation among them."""
    return {way: sum(sum(history.epochs[e].bytes[way].values()) for e in epochs) for way in ("up", "down")}


class Interruption(Exception):  # noqa: N818
    pass


@pytest.mark.parametrize("kill", ["between epochs", "within an epoch"])
def test_a_run_that_is_resumed_says_what_was_sent_in_vain(kill: str, tmp_path: Path, monkeypatch) -> None:
    """Checkpoints after 2 and 4 epochs; the run ends after 3, or in the midst of its fourth."""
    whole = fit(halves(), data(), data(), method=METHOD, training=training()).history
    sent = {"up": 0, "down": 0}

    def on_epoch(record) -> None:
        if record.epoch == 2 and kill == "between epochs":
            raise Interruption

    receive, send = LocalPeer.receive, LocalPeer.send

    def breaking(self) -> bytes:
        frame = receive(self)
        sent["up"] += len(frame)
        if sent["up"] > sum(sum(whole.epochs[e].bytes["up"].values()) for e in range(3)) + 600:
            raise Interruption
        return frame

    def counting(self, frame: bytes) -> None:
        sent["down"] += len(frame)
        send(self, frame)

    if kill == "within an epoch":
        monkeypatch.setattr(LocalPeer, "receive", breaking)
        monkeypatch.setattr(LocalPeer, "send", counting)
    more = {"method": METHOD, "training": training(checkpoint_every=2), "run": tmp_path}
    with pytest.raises(Interruption):
        fit(halves(), data(), data(), on_epoch=on_epoch, **more)
    monkeypatch.undo()
    resumed = fit(halves(), data(), data(), resume=True, **more).history
    assert [record.bytes for record in resumed.epochs] == [record.bytes for record in whole.epochs]
    assert resumed.bytes() == whole.bytes()
    lost = crossed(whole, 2)
    if kill == "within an epoch":  # and what came in of the fourth epoch before the frame that broke it
        before = crossed(whole, 0, 1, 2)
        assert lost["up"] < resumed.given_up["up"] <= lost["up"] + sent["up"] - before["up"]
        assert lost["down"] < resumed.given_up["down"] <= lost["down"] + sent["down"] - before["down"]
    else:
        assert resumed.given_up == lost
    assert Run(tmp_path).history() == resumed
    assert whole.given_up == {}


class Fragile(Local):
    """Clients in this process that are lost in an epoch, once, and recover."""

    def open(self, *arguments) -> TrustedClients:
        clients = LOCAL.open(*arguments)
        clients.recover = lambda reason: None
        return clients


@pytest.mark.parametrize("folder", [True, False])
def test_a_run_that_goes_back_to_its_checkpoint_says_what_was_sent_in_vain(folder, tmp_path, monkeypatch) -> None:
    whole = fit(halves(), data(), data(), method=METHOD, training=training()).history
    calls: list[int] = []

    def once(server, peers) -> float:
        loss = train_epoch(server, peers)
        calls.append(len(calls))
        if len(calls) == 4:
            raise StateLostError("an actor died")
        return loss

    monkeypatch.setattr("cutlayer.runs.loop.train_epoch", once)
    monkeypatch.setattr("cutlayer.backends.local.LocalClients.can_lose_state", True)
    run = tmp_path if folder else None
    more = {"method": METHOD, "training": training(checkpoint_every=2), "run": run, "backend": Fragile()}
    history = fit(halves(), data(), data(), **more).history
    trained = {
        way: sum(size for kind, size in whole.epochs[3].bytes[way].items() if kind != "evaluation")
        for way in ("up", "down")
    }
    lost = crossed(whole, 2)
    assert history.given_up["up"] == pytest.approx(
        lost["up"] + trained["up"], abs=70
    )  # but its word that it has sent its test data
    assert history.given_up["down"] == pytest.approx(
        lost["down"] + trained["down"], abs=70
    )  # but the question for these
    assert [record.bytes for record in history.epochs] == [record.bytes for record in whole.epochs]
    table = comparison({"run": history})
    assert "given up when interrupted" in table.columns[0]._cells
    assert "given up when interrupted" not in comparison({"run": whole}).columns[0]._cells


@pytest.mark.parametrize("name", ["merged.json", "given_up.json"])
def test_a_file_that_is_damaged_is_named(name: str, tmp_path: Path) -> None:
    fit(halves(), data(), data(), method=METHOD, training=training(), run=tmp_path)
    (tmp_path / name).write_text('{"epochs": ')
    with pytest.raises(ConfigError, match=rf"{name} is damaged"):
        Run(tmp_path).history()


def test_a_resumed_run_names_the_damage_and_changes_nothing(tmp_path: Path) -> None:
    def stop(record) -> None:
        if record.epoch == 2:
            raise Interruption

    more = {"method": METHOD, "training": training(checkpoint_every=2), "run": tmp_path}
    with pytest.raises(Interruption):
        fit(halves(), data(), data(), on_epoch=stop, **more)
    (tmp_path / "given_up.json").write_text('{"up": ')
    metrics = (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(ConfigError, match=r"given_up\.json is damaged.*remove the file to go on"):
        fit(halves(), data(), data(), resume=True, **more)
    assert (tmp_path / "metrics.jsonl").read_bytes() == metrics
    (tmp_path / "given_up.json").unlink()
    assert len(fit(halves(), data(), data(), resume=True, **more).history.epochs) == 5


def test_a_loss_that_nothing_recovers_from_ends_the_run(monkeypatch) -> None:
    """In one process there is nothing to put back in place: clients raise the reason that they were given."""
    reason, asked = StateLostError("it is lost"), []

    def lost(server, peers) -> float:
        raise reason

    def recover(self, error: Exception) -> None:
        asked.append(error)
        assert len(asked) < 9, "it is asked for ever"
        raise error

    monkeypatch.setattr("cutlayer.runs.loop.train_epoch", lost)
    monkeypatch.setattr("cutlayer.backends.local.LocalClients.recover", recover)
    with pytest.raises(StateLostError) as caught:
        fit(halves(), data(), data(), method=METHOD, training=training())
    assert caught.value is reason
    assert len(asked) == 1
