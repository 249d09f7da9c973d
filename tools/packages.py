"""Builds sdist and wheel, and installs the wheel with each extra in a clean environment, to do that extra's job there.

    python tools/packages.py                      # all of them; a table on the terminal and in build/packages.md
    python tools/packages.py --only export device

Needs hatchling and a package index. One environment has the wheel and what it requires itself; each other one sees
that, and has what its extra brings beside it and nothing more. `device` is what docs/afterwards.md says: no PyTorch.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import tarfile
import tempfile
import time
import tomllib
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
SMALL = "--epochs 2 --train-samples 96 --test-samples 48 --threads 1"
TRAIN = f"cutlayer train digits {SMALL} --quiet --run-dir run"
TWO = (
    "cutlayer certs tls --client alice && "
    "{ cutlayer serve digits SMALL --listen 127.0.0.1:PORT --tls tls/server --client alice MORE & } && "
    "cutlayer join 127.0.0.1:PORT --tls tls/alice --accept-cut layer3 && wait $!"
).replace("SMALL", SMALL)
BERT = """import cutlayer
from transformers import BertConfig, BertForSequenceClassification
small = dict(vocab_size=9, hidden_size=8, num_hidden_layers=2, num_attention_heads=1, intermediate_size=8)
cutlayer.split(BertForSequenceClassification(BertConfig(**small)), "bert.encoder.layer.0")"""
PRETRAINED = """from cutlayer import with_choices
from cutlayer.runs.recipes import cifar10_small
config = with_choices(cifar10_small(), model="efficientnet_lite0", width=1.0, pretrained=True)
config.network(config.data.outline())"""
NOISE = "from cutlayer.privacy.noise import Noise; assert Noise(4.0, 1.0).epsilon(1) > 0"
WITHOUT_TORCH = "import cutlayer.device.join, importlib.util; assert importlib.util.find_spec('torch') is None"

JOBS = {
    "": f"{TRAIN} && cutlayer compare run && cutlayer plan digits --cuts layer3 && python -m cutlayer --version",
    "grpc": TWO.replace("MORE", ""),
    "metrics": TWO.replace("MORE", "--metrics 127.0.0.1:0"),
    "ray": f"cutlayer train digits {SMALL} --clients 2 --backend ray --actors 1",
    "report": f"{TRAIN} --tensorboard && cutlayer report run --output page.html && test -s page.html",
    "privacy": f"{TRAIN} && cutlayer attack run --attack known_half --effort 0.02 --images 8 && python -c '{NOISE}'",
    "export": f"{TRAIN} && cutlayer export run && cutlayer predict run --codecs int4",
    "docs": "python -m zensical --version",
    "hf": f"python -c '{BERT}'",
    "transfer": f"python -c '{PRETRAINED}'",
    "device": f'cutlayer-device --help && python -c "{WITHOUT_TORCH}"',
}
BESIDE = {"metrics": "grpc"}
DEVICE = ("numpy", "msgspec", "zstandard", "onnxruntime", "grpcio", "grpcio-health-checking", "cryptography")


def run(*command: str | Path, **options: object) -> None:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, **options)  # type: ignore[call-overload]
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")


def build(source: Path, folder: Path, target: str) -> Path:
    """The sdist or wheel of a source tree."""
    run(sys.executable, "-m", "hatchling", "build", "-t", target, "-d", folder, cwd=source)
    return next(folder.glob("*.tar.gz" if target == "sdist" else "*.whl"))


def built(folder: Path) -> Path:
    """The wheel, once it is known that the sdist builds the same, byte for byte."""
    wheel, sdist = build(ROOT, folder / "wheel", "wheel"), build(ROOT, folder / "sdist", "sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    again = build(next(folder.glob("cutlayer-*/")), folder / "again", "wheel")
    digests = [hashlib.sha256(each.read_bytes()).hexdigest() for each in (wheel, again)]
    if digests[0] != digests[1]:
        raise RuntimeError(f"the sdist builds another wheel: {digests}")
    print(f"{wheel.name} {wheel.stat().st_size >> 10} KiB, {sdist.name} {sdist.stat().st_size >> 10} KiB", flush=True)
    return wheel


class Environment:
    """A virtual environment that sees what another has, if one is given."""

    def __init__(self, place: Path, sees: Environment | None = None) -> None:
        run(sys.executable, "-m", "venv", place)
        self.python, self.place = place / "bin" / "python", place
        self.packages = next(place.glob("lib/python*/site-packages"))
        if sees is not None:
            (self.packages / "core.pth").write_text(f"{sees.packages}\n")

    def install(self, *what: str | Path) -> None:
        pip = ("-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-c", ROOT / "constraints.txt")
        run(self.python, *pip, *what)

    def carry_out(self, job: str) -> None:
        clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "CUTLAYER_DATA")}
        path = f"{self.place / 'bin'}{os.pathsep}{os.environ['PATH']}"
        with tempfile.TemporaryDirectory() as work:
            job = job.replace("PORT", str(20000 + os.getpid() % 20000))
            run("bash", "-ec", job, cwd=work, env={**clean, "PATH": path, "OMP_NUM_THREADS": "1"})


def tried(name: str, wheel: Path, folder: Path, core: Environment | None) -> tuple[Environment, list[str]]:
    """An environment with an extra, and its row of the table: what came with it, and whether it did its job."""
    begun = time.perf_counter()
    environment = Environment(folder / (name or "core"), None if name == "device" else core)
    before = len(list(environment.packages.glob("*.dist-info")))
    if name == "device":
        environment.install("--no-deps", wheel)
        environment.install(*DEVICE)
    else:
        extras = ",".join(filter(None, (name, BESIDE.get(name))))
        environment.install("--no-deps", "--ignore-installed", wheel)  # its commands belong to this environment
        environment.install(f"cutlayer[{extras}] @ {wheel.as_uri()}" if extras else wheel)
    count = len(list(environment.packages.glob("*.dist-info"))) - before - 1
    installed = time.perf_counter()
    environment.carry_out(JOBS[name])
    assert list((environment.packages / "cutlayer").glob("py.typed"))
    seconds = installed - begun, time.perf_counter() - installed
    return environment, [name or "(none)", str(count), *(f"{each:.0f}" for each in seconds), "did its job"]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=[*filter(None, JOBS)], help="extras; by default all")
    chosen = parser.parse_args(arguments)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(extras) - {"dev"} == set(JOBS) - {"", "device"}, "each extra has a job here"
    names = [""] + [name for name in JOBS if name and (chosen.only is None or name in chosen.only)]
    lines = ["| extra | packages that it brings | installed in s | job in s | |", "|---|---|---|---|---|"]
    failed = 0
    with tempfile.TemporaryDirectory(prefix="cutlayer-packages-") as work:
        wheel, core = built(Path(work)), None
        for name in names:
            try:
                environment, row = tried(name, wheel, Path(work), core)
                core = core or environment
            except RuntimeError as error:
                failed, row = failed + 1, [name, "", "", "", "FAILED"]
                print(error, file=sys.stderr)
                if core is None:
                    return 1
            lines.append(f"| {' | '.join(row)} |")
            print(lines[-1], flush=True)
    table = ROOT / "build" / "packages.md"
    table.parent.mkdir(exist_ok=True)
    table.write_text("\n".join(lines) + "\n")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
