"""What may be chosen otherwise when a run is resumed: its end, and what has no influence on the bits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cutlayer.describe import differences

FREE = ("epochs", "checkpoint_every", "keep_checkpoints", "live")
FREE_WHOLE = ("keep_best", "early_stopping")
FREE_STORE = ("placement", "memory_budget_mib", "disk_budget_mib", "folder")


def hindrances(begun: Mapping[str, Any], config: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, str]:
    """What of config and facts differs from what the run was begun with, and may not, by path.

    Args:
        begun: the content of config.json.
    """
    different = {path: how for path, how in differences(begun["config"], config).items() if not _free(path)}
    return different | differences(begun.get("facts", {}), facts)


def _free(path: str) -> bool:
    """Whether this choice may be another one when the run is resumed."""
    *parents, name = path.split(".")
    if parents[-1:] == ["store"]:
        return name in FREE_STORE
    if parents[:1] == ["task"]:
        return False
    return path == "data.folder" or name in FREE or any(part in FREE_WHOLE for part in (*parents[-1:], name))
