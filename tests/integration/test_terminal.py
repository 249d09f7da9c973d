"""What a person sees at the command line: on a terminal, in a pipe, quiet, completed, and when something is wrong."""

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cutlayer import Run
from cutlayer.cli import main
from cutlayer.cli.entry import COMMANDS

SMALL = ["train", "digits", "--train-samples", "100", "--test-samples", "40", "--epochs", "3", "--threads", "1"]


def test_a_terminal_gets_a_bar_and_a_pipe_gets_lines(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "cutlayer", *SMALL, "--run-dir"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "xterm-256color", "COLUMNS": "150"}
    piped = subprocess.run([*command, "piped"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert piped.returncode == 0, piped.stderr
    assert "\x1b" not in piped.stdout + piped.stderr
    assert re.search(r"drop: epoch 3/3  [ABC]  loss [\d.]+  accuracy [\d.]+  [\d.]+ \w+ so far  \(", piped.stdout)
    main_end, terminal_end = pty.openpty()
    process = subprocess.Popen(
        [*command, "seen"], cwd=tmp_path, env=environment, stdout=terminal_end, stderr=terminal_end
    )
    os.close(terminal_end)
    shown = b""
    try:
        while part := os.read(main_end, 1 << 16):
            shown += part
    except OSError:  # the other end is closed
        pass
    assert process.wait(60) == 0
    assert b"\x1b[" in shown
    assert re.search(r"epoch 3/3", shown.decode(errors="replace"))


def test_quiet_is_quiet_and_tensorboard_has_every_epoch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--quiet", "--tensorboard", "--run-dir", str(tmp_path / "run")]) == 0
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", "")
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert {"loss/train", "loss/test", "accuracy/test", "bytes/up", "flops/client"} <= set(events.Tags()["scalars"])
    written = events.Scalars("loss/train")
    assert [event.step for event in written] == [1, 2, 3]
    assert [event.value for event in written] == pytest.approx(Run(tmp_path / "run").history().losses)


def test_an_error_is_one_line_and_its_traceback_is_for_debugging(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(arguments: object, console: object) -> None:
        raise ZeroDivisionError("by\nnothing")

    monkeypatch.setitem(COMMANDS, "compare", fails)
    assert main(["compare"]) == 1
    assert capsys.readouterr().err == (
        "error: ZeroDivisionError: by nothing; run it again with --debug to see where it comes from\n"
    )
    assert main(["compare", "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err
    assert main(["report", "nowhere", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("typed", "wanted"),
    [("cutlayer pl", "plan"), ("cutlayer train cifar", "cifar10_small"), ("cutlayer plan digits --li", "--link")],
)
def test_completion_in_a_shell(typed: str, wanted: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "bash"]) == 0
    words = typed.split()
    quoted = " ".join(f"'{word}'" for word in words)
    typing = f"COMP_WORDS=({quoted}); COMP_CWORD={len(words) - 1}; _cutlayer; echo ${{COMPREPLY[@]}}"
    script = f"{capsys.readouterr().out}\n{typing}"
    shown = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stdout.split()
    assert wanted in shown


def test_every_command_says_what_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(re.search(rf"^  {name} +\S", shown, re.MULTILINE) for name in (*COMMANDS, "completion"))
    assert main(["completion", "fish"]) == 2
