"""Numbers as a person reads them."""

from __future__ import annotations


def human_bytes(count: float) -> str:
    """Bytes with a binary unit, such as "2.8 MiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError("unreachable")
