"""Damaged payloads: a short form of benchmarks/fuzz_codecs.py. CUTLAYER_FUZZ sets the count (10^6 takes minutes)."""

import importlib.util
import os
from pathlib import Path

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "fuzz_codecs.py"


def test_decoders_survive_damaged_payloads() -> None:
    spec = importlib.util.spec_from_file_location("fuzz_codecs", BENCHMARK)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    count = int(os.environ.get("CUTLAYER_FUZZ", "20000"))
    outcomes = module.fuzz(count, seed=count)
    assert sum(outcomes.values()) == count
    assert min(outcomes[what] for what in ("refused", "decoded", "frame refused", "frame read")) > count / 100
