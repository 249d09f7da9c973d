"""The examples run and learn."""

import re
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name: str, epochs: int) -> str:
    command = [sys.executable, str(EXAMPLES / name), "--epochs", str(epochs)]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=240).stdout


def test_the_loop_by_hand() -> None:
    shown = run("by_hand.py", 8)
    assert re.findall(r"^epoch +\d+  ([ABC])", shown, re.MULTILINE)[-3:] == ["B", "C", "C"]
    assert float(shown.split()[-1]) > 0.97


def test_a_network_of_ones_own() -> None:
    shown = run("own_network.py", 6)
    assert float(shown.splitlines()[5].split()[-1]) > 0.95
    assert "merged network: Network" in shown
