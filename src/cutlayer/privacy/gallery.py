"""Originals beside their reconstructions, as one PNG."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cutlayer import files
from cutlayer.errors import ConfigError

TILE, GAP, MARGIN, LINE = 64, 4, 8, 14


def save_gallery(originals: Tensor, rows: Mapping[str, Tensor], file: str | Path, most: int = 12) -> None:
    """Write a PNG: the originals in the first row, and below a row of reconstructions for each name.

    Args:
        originals: float [N, C, H, W] from 0 to 1, of 1 or 3 channels; further channels are left out.
        rows: reconstructions of the same shape, by what each row is called.
        most: images in a row at most.

    Raises:
        ConfigError: Pillow is not installed.
    """
    try:
        from PIL import Image, ImageDraw
    except ModuleNotFoundError:
        raise ConfigError("a gallery needs Pillow: pip install 'cutlayer[privacy]'") from None
    count = min(most, len(originals))
    every = {"original": originals, **rows}
    height = MARGIN + len(every) * (TILE + LINE + GAP)
    sheet = Image.new("RGB", (2 * MARGIN + count * (TILE + GAP), height), "white")
    draw = ImageDraw.Draw(sheet)
    for row, (name, images) in enumerate(every.items()):
        top = MARGIN + row * (TILE + LINE + GAP)
        draw.text((MARGIN, top), name, fill="black")
        for column, image in enumerate(images[:count]):
            tile = Image.fromarray(_pixels(image)).resize((TILE, TILE), Image.Resampling.NEAREST)
            sheet.paste(tile, (MARGIN + column * (TILE + GAP), top + LINE))
    out = io.BytesIO()
    sheet.save(out, format="PNG")
    files.replace(Path(file), out.getvalue())


def _pixels(image: Tensor) -> np.ndarray:
    """uint8 [H, W, 3]."""
    colours = image.detach().cpu().clamp(0, 1).mul(255).round().to(torch.uint8)
    colours = colours[:3] if len(colours) >= 3 else colours[:1].expand(3, -1, -1)
    return colours.permute(1, 2, 0).contiguous().numpy()
