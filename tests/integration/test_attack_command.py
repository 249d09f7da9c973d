"""`cutlayer attack` on the folder of a run."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from cutlayer import ConfigError, Halves, fit, with_choices
from cutlayer.cli import main
from cutlayer.privacy import save_gallery
from cutlayer.privacy.defence import Defence
from cutlayer.runs.attack import attacked
from cutlayer.runs.experiment import run_experiment
from cutlayer.runs.recipes import digits
from tests.helpers import small

CHOICES = {"cut": "layer1", "epochs": 2, "width": 0.5, "train_samples": 200, "schedule": "always", "threads": 1}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "digits"
    run_experiment(with_choices(digits(), **CHOICES), folder, progress=False)
    return folder


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_attacks_write_lines_a_gallery_and_a_table(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--images", "8", "--public", "200", "--effort", "0.1"]
    assert main(["attack", str(run), "--attack", "known_half", "decoder", "labels", "frames", *options]) == 0
    found = {line["attack"]: line for line in lines(run / "attacks.jsonl")}
    assert list(found) == ["known_half", "decoder", "labels", "frames"]
    assert found["known_half"]["scores"]["mse"]["count"] == 8
    assert found["known_half"]["scores"]["mse"]["mean"] < found["known_half"]["baseline"]["mse"]["mean"]
    assert found["decoder"]["environment"]["torch"]
    with Image.open(run / "attacks.png") as image:
        assert image.format == "PNG"
        assert image.width > 8 * 64
    shown = capsys.readouterr().out
    assert "known_half" in shown
    assert "mean image" in shown
    assert "norm AUC" in shown
    shown = " ".join(shown.split())
    assert "known_half: 50 steps of the usual 500; the attacker has" in shown
    assert "decoder: 5 epochs of the usual 50; the attacker has" in shown
    assert "of 200 auxiliary images" in shown
    assert "Shorter than usual. What an attack got leaks; what it did not, a longer one may get." in shown
    assert (found["decoder"]["took"], found["decoder"]["public"]) == ({"epochs": 5}, 200)


def test_an_attack_of_its_usual_length_is_not_called_short(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["attack", str(run), "--attack", "known_half", "--images", "2", "--public", "10"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "known_half: 500 steps; the attacker has" in shown
    assert "What an attack got leaks; what it did not, a longer one may get." in shown
    assert "Shorter" not in shown


def test_a_report_says_how_long_attacks_were(run: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(run, tmp_path / "run")
    (folder / "attacks.jsonl").unlink(missing_ok=True)
    assert main(["report", str(folder)]) == 0
    assert "What attacks got back" not in (folder / "report.html").read_text()
    for effort in ("1", "0.02"):  # the newest counts
        options = ["--images", "4", "--public", "30", "--effort", effort]
        assert main(["attack", str(folder), "--attack", "known_half", "frames", *options]) == 0
    assert main(["report", str(folder)]) == 0
    for suffix in (".html", ".md"):
        text = (folder / f"report{suffix}").read_text()
        assert "What attacks got back" in text
        assert "10 steps of the usual 500" in text
        assert "500 steps" not in text.replace("usual 500 steps", "")
        assert "Shorter than usual. What an attack got leaks; what it did not, a longer one may get." in text


def test_a_second_attack_adds_to_the_lines(run: Path) -> None:
    before = len(lines(run / "attacks.jsonl")) if (run / "attacks.jsonl").exists() else 0
    assert main(["attack", str(run), "--attack", "frames", "--images", "4", "--public", "20"]) == 0
    assert len(lines(run / "attacks.jsonl")) == before + 1


def test_noise_of_the_run_is_there_under_attack(tmp_path: Path) -> None:
    choices = {**CHOICES, "epochs": 1, "codec": "fp32", "defence": Defence(noise=0.5, clip=1.0)}
    run_experiment(with_choices(digits(), **choices), tmp_path, progress=False)
    target = attacked(tmp_path, images=32, public=10).target
    squares = target.send(target.private).flatten(1).square().sum(1).mean().item()
    assert squares == pytest.approx(1 + 0.25 * target.send(target.private)[0].numel(), rel=0.1)


def test_an_earlier_checkpoint_can_be_attacked(run: Path) -> None:
    early, late = attacked(run, images=4, public=10, epochs=1), attacked(run, images=4, public=10)
    assert (early.epochs, late.epochs) == (1, 2)
    sent = [each.target.send(each.target.private) for each in (early, late)]
    assert not torch.equal(*sent)


def test_the_target_has_the_halves_that_were_trained(run: Path, tmp_path: Path) -> None:
    result = run_experiment(with_choices(digits(), **CHOICES), progress=False)
    target = attacked(run, images=4, public=10).target
    for name, value in result.halves.client.state_dict().items():
        assert torch.equal(value.cpu(), target.half.state_dict()[name])


def test_advice_has_a_line_for_each_cut_and_a_figure(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--images", "8", "--public", "100", "--effort", "0.1"]
    assert main(["attack", str(run), "--advise", "--attack", "known_half", *options]) == 0
    found = lines(run / "advice.jsonl")
    cuts = [line["cut"] for line in found]
    assert cuts == ["layer1", "layer2", "layer3", "layer4", "layer5", "pool"]
    assert [line["forward"] for line in found] == sorted(line["forward"] for line in found)
    by_cut = {line["cut"]: line for line in found}
    shallow, deep = (by_cut[cut]["assessment"]["scores"]["ssim"]["mean"] for cut in ("layer1", "pool"))
    assert shallow > deep
    assert by_cut["layer1"]["sample_bytes"] == pytest.approx(8 * 8 * 8, abs=1)
    with Image.open(run / "advice.png") as image:
        assert image.format == "PNG"
    shown = capsys.readouterr().out
    assert "MFLOPs B, A" in shown
    assert "known_half: 50 steps of the usual 500, 100 auxiliary images Shorter than" in " ".join(shown.split())
    plan = ["plan", "digits", "--cuts", "layer1", "pool", "--width", "0.5", "--train-samples", "200"]
    assert main([*plan, "--advice", str(run / "advice.jsonl")]) == 0
    shown = capsys.readouterr().out
    assert f"{shallow:.3f} ± " in shown
    assert f"{deep:.3f} ± " in shown


def test_an_unknown_attack_lists_those_that_there_are(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["attack", str(run), "--attack", "magic"]) == 2
    assert "decoder, known_half, unsplit, fsha, sdar, labels, frames, all" in capsys.readouterr().err.replace("\n", " ")


def test_a_run_that_was_begun_from_python_is_refused_with_what_to_do(tmp_path: Path) -> None:
    halves: Halves = small.halves()
    fit(halves, small.data()[0], training=small.training(1), run=tmp_path / "run", progress=False)
    with pytest.raises(ConfigError, match=r"begun from Python.*Target\(half, server"):
        attacked(tmp_path / "run")


def test_a_gallery_shows_the_pixels_it_is_given(tmp_path: Path) -> None:
    originals = torch.zeros(2, 3, 4, 4)
    originals[0, 0], originals[1, 2] = 1, 1
    save_gallery(originals, {"inverted": 1 - originals}, tmp_path / "gallery.png")
    with Image.open(tmp_path / "gallery.png") as image:
        colours = {colour for _, colour in image.getcolors(maxcolors=1 << 16)}
    assert {(255, 0, 0), (0, 0, 255), (0, 255, 255), (255, 255, 0)} <= colours
