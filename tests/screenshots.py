"""Screenshots of pages in a browser, and the places of their figures."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="Chromium, which pages are looked at with, is not installed"
)

DARK, LIGHT = 0, 1  # Blink's numbers for the preferred colour scheme


def screenshots(
    pages: Sequence[tuple[Path, int]], folder: Path, *, scheme: int = LIGHT, height: int = 3000
) -> list[np.ndarray]:
    """Return the tops of pages, each (height, its width, 3) uint8.

    All pages are shown side by side at once, because starting a browser takes longer than drawing.
    The sheet stays in `folder` as a PNG.

    Args:
        pages: pages and the widths of their windows in pixels.
        scheme: DARK or LIGHT.
    """
    assert CHROMIUM is not None
    frames = "".join(
        f'<iframe src="{page.resolve().as_uri()}" width="{width}" height="{height}"></iframe>'
        for page, width in pages
    )
    sheet = folder / f"sheet-{scheme}.html"
    sheet.write_text(
        "<!doctype html><meta name='color-scheme' content='light dark'>"
        "<style>body { margin: 0; display: flex } iframe { border: 0; flex: none }</style>"
        + frames,
        "utf-8",
    )
    picture = sheet.with_suffix(".png")
    done = subprocess.run(
        [
            CHROMIUM,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            "--force-color-profile=srgb",
            f"--blink-settings=preferredColorScheme={scheme}",
            f"--user-data-dir={folder / 'browser'}",
            f"--window-size={sum(width for _, width in pages)},{height}",
            f"--screenshot={picture}",
            sheet.resolve().as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert picture.is_file(), done.stderr
    with Image.open(picture) as image:
        whole = np.asarray(image.convert("RGB"))
    ends = np.cumsum([width for _, width in pages])
    return np.split(whole, ends[:-1], axis=1)


def with_figures_painted_over(page: Path) -> Path:
    """Write a copy of a page, on which `figure_places` finds the figures, and return its path."""
    text = page.read_text("utf-8")
    count = len(re.findall("<figure", text))
    paint = "".join(
        f"figure:nth-of-type({nth + 1}) svg {{ background: rgb(255, 0, {nth}) }}"
        for nth in range(count)
    )
    copy = page.with_name(f"{page.stem}-painted.html")
    style = f"<style>{paint} figure svg * {{ visibility: hidden }}</style>"
    copy.write_text(text.replace("</head>", f"{style}</head>"), "utf-8")
    return copy


def figure_places(painted: np.ndarray) -> list[tuple[slice, slice]]:
    """Return rows and columns of every figure on a picture of `with_figures_painted_over`."""
    red, green, nth = np.moveaxis(painted, -1, 0)
    paint = (red == 255) & (green == 0)
    places = []
    while True:
        rows, columns = np.nonzero(paint & (nth == len(places)))
        if not len(rows):
            return places
        places.append((slice(rows.min(), rows.max() + 1), slice(columns.min(), columns.max() + 1)))


def pixels_like(picture: np.ndarray, color: str, tolerance: int = 12) -> int:
    """Count the pixels of a colour, given as "#rrggbb"."""
    wanted = np.array([int(color[at : at + 2], 16) for at in (1, 3, 5)], np.int16)
    return int((np.abs(picture - wanted).max(axis=-1) <= tolerance).sum())
