"""What the studies of the paper's experiments write down of a run."""

from __future__ import annotations

from typing import Any

from cutlayer.runs.config import RunConfig
from cutlayer.runs.fit import Result

EXCHANGED = ("activations", "gradients")


def figures(config: RunConfig, result: Result, *, preset: str) -> dict[str, Any]:
    """Accuracy over the wire and merged, epochs, bytes by the ledger, FLOPs, seconds; evaluation is apart."""
    history = result.history
    tested = {record.epoch + 1: round(record.test["accuracy"], 5) for record in history.epochs if record.test}
    return {
        "preset": preset,
        "seed": config.training.seed,
        "accuracy": history.test("accuracy"),
        "accuracy_merged": history.merged.get("accuracy"),
        "exchanges": history.exchanges,
        "exchanged_bytes": history.bytes(kinds=EXCHANGED),
        "bytes_up": history.bytes("up"),
        "bytes_down": history.bytes("down"),
        "weights_bytes": history.bytes(kinds=("weights",)),
        "evaluation_bytes": history.bytes(kinds=("evaluation",)),
        "client_flops": history.flops("client"),
        "server_flops": history.flops("server"),
        "seconds": round(history.seconds, 1),
        "loss": round(history.losses[-1], 5),
        "accuracy_by_epoch": tested,
    }
