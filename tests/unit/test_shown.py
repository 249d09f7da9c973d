"""What a person sees of a run in Python: progress, short representations, a frame."""

import builtins
import io
import sys

import pytest
import torch
from rich.console import Console
from torch import nn
from torch.utils.data import TensorDataset

from cutlayer import Always, ConfigError, Drop, Fleet, Halves, Method, Result, Run, Training, fit
from cutlayer.records.history import EpochRecord
from cutlayer.report.progress import ProgressView

DATA = TensorDataset(torch.randn(8, 3), torch.arange(8) % 3)


def trained(**more: object) -> Result:
    return fit(Halves(nn.Linear(3, 4), nn.Linear(4, 3)), DATA, DATA, training=Training(epochs=2, batch_size=4), **more)


def test_a_script_is_quiet_unless_it_asks_for_progress(capsys) -> None:
    trained()
    assert capsys.readouterr() == ("", "")
    trained(progress=True)
    seen = capsys.readouterr()
    assert seen.out == ""
    assert "always: epoch 2/2  A  loss" in seen.err
    assert len(seen.err.splitlines()) == 2


def test_a_terminal_shows_progress_unless_told_otherwise(monkeypatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm")
    for progress, visible in ((None, True), (False, False)):
        monkeypatch.setattr(sys, "stderr", Terminal())
        trained(progress=progress)
        assert ("epoch 2/2" in sys.stderr.getvalue()) == visible


def test_the_figures_of_a_long_run_fit_a_terminal_of_80_columns() -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=80, color_system=None)
    sent = {"up": {"activations": 300 << 20}}
    record = EpochRecord(epoch=99, exchange="A", loss=1.2345, samples=8, test={"accuracy": 0.9917}, bytes=sent)
    with ProgressView("plain split learning", 100, console) as view:
        view(record)
    assert "epoch 100/100  A  loss 1.2345  accuracy 0.9917  300.0 MiB so far  (A)" in screen.getvalue()
    assert "plain split learning " in screen.getvalue()


def test_representations_are_short(tmp_path) -> None:
    result = trained(run=tmp_path / "run")
    assert repr(Halves(nn.Linear(3, 4), nn.Linear(4, 3))) == (
        "Halves(client=<Linear, 16 parameters>, server=<Linear, 15 parameters>)"
    )
    assert repr(result.history).startswith("History(2 epochs (2 A, 0 B, 0 C); loss ")
    assert "test accuracy" in repr(result.history)
    assert repr(result) == f"Result({result.history!r}, model=<Sequential>)"
    assert repr(Run(tmp_path / "run")) == f"Run('{tmp_path}/run', 2 epochs)"
    assert repr(Run(tmp_path / "other")).endswith("/other', not begun)")
    assert repr(Method()) == "Method(Always(warmup=1))"
    some = Method.of(Drop(threshold=0.1), "fp8", fleet=Fleet(fraction=0.5))
    assert repr(some).startswith(
        "Method(Drop(warmup=1, threshold=0.1), activations='fp8_e4m3', gradients='fp8_e5m2', fl"
    )
    assert Method.of(Always()) == Method()


def test_a_history_is_a_frame(monkeypatch) -> None:
    pytest.importorskip("pandas")
    history = trained().history
    frame = history.to_frame()
    assert frame["loss"].tolist() == history.losses
    assert frame["test.accuracy"].iloc[-1] == history.test("accuracy")
    assert frame["bytes.up.activations"].sum() == history.bytes("up", ("activations",))
    imported = builtins.__import__

    def without_pandas(name: str, *more: object):
        if name == "pandas":
            raise ModuleNotFoundError(name)
        return imported(name, *more)

    monkeypatch.setattr(builtins, "__import__", without_pandas)
    with pytest.raises(ConfigError, match="needs pandas: pip install pandas"):
        history.to_frame()
