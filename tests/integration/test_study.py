"""A study goes on where it was, whatever ended it, and several jobs give what one gives."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cutlayer import ConfigError, CutlayerError, Fleet, Method, RunConfig, StoreOptions, with_choices
from cutlayer.errors import DamagedError
from cutlayer.schedule import Always, Drop
from cutlayer.studies import Outcome, Study
from tests.helpers.study import SMALL, study

ROOT = Path(__file__).parents[2]
FLAT = {"data": "digits", "train_samples": 64, "test_samples": 32, "model": "cnn", "width": 0.25, "cut": "layer3",
        "schedule": "always", "threshold": 0.3, "codec": "fp8", "norm_in_b": "train", "batch_size": 32, "epochs": 2,
        "seed": 1, "threads": 1}  # fmt: skip


def losses(outcomes: list[Outcome]) -> dict[int, list[float]]:
    return {outcome["seed"]: outcome["losses"] for outcome in outcomes}


def test_what_is_there_is_not_run_again(tmp_path: Path) -> None:
    file = tmp_path / "results" / "study.jsonl"
    first, seen = study(file, 2), []
    done = first.run(on_done=lambda outcome: seen.append(outcome["seed"]))
    assert seen == [0, 1]
    assert [outcome.config for outcome in done] == first.configs
    assert {"losses", "config", "environment"} <= done[0].values.keys()
    text = file.read_text()
    assert first.run(on_done=lambda outcome: seen.append("again")) == done
    assert file.read_text() == text
    assert [config.training.seed for config in study(file, 4).todo()] == [2, 3]
    assert Study(file, []).outcomes() == done  # those of other configs, too

    # Cut short by a kill, or left without its end by an editor.
    for torn in (text[:-20], text[:-1]):
        file.write_text(torn)
        rest = study(file, 2).todo()
        assert len(rest) == (1 if torn == text[:-20] else 0)
        assert losses(study(file, 2).run()) == losses(done)
    file.write_text("{}\n" + text)
    with pytest.raises(DamagedError, match="line 1 is damaged"):
        first.todo()


def test_two_jobs_give_what_one_gives(tmp_path: Path) -> None:
    one = losses(study(tmp_path / "one.jsonl", 3).run())
    assert losses(study(tmp_path / "two.jsonl", 3).run(jobs=2)) == one


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_kill_loses_the_runs_under_way_and_no_more(jobs: int, tmp_path: Path) -> None:
    file = tmp_path / "study.jsonl"
    command = [sys.executable, "-m", "tests.helpers.study", str(file), "50", str(jobs)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)
    deadline = time.monotonic() + 120
    while not (file.exists() and file.read_bytes().count(b"\n") >= 2) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    text = file.read_text()
    lines = text.splitlines()
    assert len(lines) >= 2
    while time.monotonic() < deadline:  # its jobs end with it
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            break
        time.sleep(0.05)
    assert file.read_text() == text
    done = {json.loads(line)["seed"] for line in lines}
    assert len(done) == len(lines)
    more = study(file, max(done) + 2)
    assert len(more.run()) == max(done) + 2
    assert file.read_text().startswith(text)  # what was done has not been run again
    assert more.todo() == []


def test_a_study_is_at_work_in_one_process_only(tmp_path: Path) -> None:
    file = tmp_path / "study.jsonl"

    def again(outcome: Outcome) -> None:
        with pytest.raises(ConfigError, match="another process is at work on this study"):
            study(file, 3).run()

    assert len(study(file, 2).run(on_done=again)) == 2


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_run_that_fails_does_not_hold_up_the_others(jobs: int, tmp_path: Path) -> None:
    wild = with_choices(SMALL, cut="nowhere")
    broken = Study(tmp_path / "study.jsonl", [wild, SMALL])
    with pytest.raises(CutlayerError, match=r"1 runs failed.*no layer 'nowhere' to cut at"):
        broken.run(jobs)
    assert broken.todo() == [wild]


def test_what_cannot_change_a_result_tells_no_runs_apart(tmp_path: Path) -> None:
    file = tmp_path / "study.jsonl"
    file.write_text(json.dumps({"config": FLAT}) + "\n")
    same = with_choices(SMALL, seed=1, data_dir="elsewhere", live_clients=2, checkpoint_every=5, norm_in_b="eval")
    assert Study(file, [same]).todo() == []
    method = Method.of(Always(), "fp8", store=StoreOptions("disk"), fleet=Fleet(live=3))
    assert Study(file, [RunConfig(same.data, same.model, method, same.training, threads=1)]).todo() == []
    for other in (
        with_choices(same, seed=2),
        with_choices(same, threads=2),
        with_choices(same, epochs=3),
        with_choices(same, schedule="drop"),
    ):
        assert Study(file, [other]).todo() == [other]
    b_epochs = with_choices(same, schedule="drop", norm_in_b="train")
    assert isinstance(b_epochs.method.schedule, Drop)
    file.write_text(json.dumps({"config": b_epochs.as_dict()}) + "\n")
    assert Study(file, [b_epochs]).todo() == []
    assert Study(file, [with_choices(b_epochs, norm_in_b="eval")]).todo() != []
    with pytest.raises(ConfigError, match="run 2 of the study is run 1 again"):
        Study(file, [same, with_choices(same, norm_in_b="train")])
