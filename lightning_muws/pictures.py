"""Pictures that need no plotting library: PNG files of pixels, and line charts as SVG."""

from __future__ import annotations

import base64
import html
import math
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_muws.tables import visible

WIDTH, HEIGHT = 640, 260  # of a chart
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 34, 44  # around what is drawn
N_TICKS = 5
MAX_COLOURS = 256  # of a picture whose pixels are indices into a palette


def png(pixels: NDArray[np.uint8]) -> bytes:
    r"""Return a PNG file of pixels, with a palette where they have at most 256 colours.

    Source: Portable Network Graphics (PNG) Specification (Third Edition), sections 5 and 11; filter type 0.

    Args:
        pixels: ``(height, width, 3)``: red, green and blue, each from 0 to 255; at least one pixel.

    Example:
        >>> png(np.zeros((2, 3, 3), np.uint8))[:4]
        b'\x89PNG'
    """
    height, width, _ = pixels.shape
    packed = pixels.astype(np.uint32) @ np.array([1 << 16, 1 << 8, 1], np.uint32)
    colours, at = np.unique(packed, return_inverse=True)
    if len(colours) <= MAX_COLOURS:
        rows, kind = at.reshape(height, width).astype(np.uint8), 3
        palette = _chunk(b"PLTE", colours.astype(">u4").view(np.uint8).reshape(-1, 4)[:, 1:].tobytes())
    else:
        rows, kind, palette = pixels.reshape(height, -1), 2, b""
    lines = np.concatenate([np.zeros((height, 1), np.uint8), rows], axis=1)  # filter type 0 begins each line
    head = struct.pack(">IIBBBBB", width, height, 8, kind, 0, 0, 0)
    data = _chunk(b"IDAT", zlib.compress(lines.tobytes(), 9))
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", head) + palette + data + _chunk(b"IEND", b"")


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def data_url(file: bytes) -> str:
    """Return a PNG file as the ``src`` of an image, so that a page needs no other file."""
    return "data:image/png;base64," + base64.b64encode(file).decode("ascii")


@dataclass(frozen=True)
class Line:
    """A line of a chart.

    Args:
        label: Its name in the legend.
        colour: A colour of CSS.
        points: Its points ``(x, y)``, in order; all finite.
        dash: Its dashes, as ``stroke-dasharray`` of SVG; empty for a solid line.
    """

    label: str
    colour: str
    points: Sequence[tuple[float, float]]
    dash: str = ""


@dataclass(frozen=True)
class Span:
    """A part of the x axis with a background and a name, such as a phase.

    Args:
        label: Its name.
        start: Where it begins.
        stop: Where it ends.
        colour: A colour of CSS; it is drawn faintly.
    """

    label: str
    start: float
    stop: float
    colour: str


def line_chart(lines: Sequence[Line], spans: Sequence[Span], x_label: str, y_label: str) -> str:
    """Return a chart as an SVG element; the y axis begins at 0.

    Args:
        lines: At least one, with at least one point in all.
        spans: Parts of the x axis.
        x_label: What x is.
        y_label: What y is.
    """
    xs = [x for line in lines for x, _ in line.points] + [x for span in spans for x in (span.start, span.stop)]
    low, high = min(xs), max(xs)
    if high == low:
        low, high = low - 0.5, high + 0.5
    top = max((y for line in lines for _, y in line.points), default=0.0) * 1.1 or 1.0
    inner_w, inner_h = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def at_x(x: float) -> float:
        return LEFT + (x - low) / (high - low) * inner_w

    def at_y(y: float) -> float:
        return TOP + inner_h - y / top * inner_h

    bottom = TOP + inner_h
    parts = []
    for span in spans:
        x, w = at_x(span.start), at_x(span.stop) - at_x(span.start)
        parts.append(_tag("rect", x=x, y=TOP, width=w, height=inner_h, fill=span.colour, opacity=0.1))
        parts.append(_text(span.label, x + 4, TOP + 13))
    for value in _ticks(low, high):
        parts.append(_tag("path", d=f"M{at_x(value):.1f} {bottom}v4", stroke="currentColor"))
        parts.append(_text(f"{value:g}", at_x(value), bottom + 16, "middle"))
    for value in _ticks(0.0, top):
        grid = f"M{LEFT} {at_y(value):.1f}h{inner_w}"
        parts.append(_tag("path", d=grid, stroke="currentColor", opacity=0.15))
        parts.append(_text(f"{value:g}", LEFT - 6, at_y(value) + 4, "end"))
    for line in lines:
        places = [(at_x(x), at_y(y)) for x, y in line.points]
        path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places) if places else "M0 0"
        dashes = {"stroke-dasharray": line.dash} if line.dash else {}
        parts.append(_tag("path", d=path, stroke=line.colour, fill="none", **{"stroke-width": 2}, **dashes))
        parts += [_tag("circle", cx=x, cy=y, r=3, fill=line.colour) for x, y in places]
    at = LEFT
    for line in lines:
        parts.append(_tag("rect", x=at, y=8, width=12, height=12, fill=line.colour))
        parts.append(_text(line.label, at + 17, 18))
        at += 30 + 7 * len(line.label)
    parts.append(_text(x_label, LEFT + inner_w / 2, HEIGHT - 8, "middle"))
    parts.append(_text(y_label, 14, TOP + inner_h / 2, "middle", transform=f"rotate(-90 14 {TOP + inner_h / 2:.1f})"))
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{"".join(parts)}</svg>'


def _ticks(low: float, high: float) -> list[float]:
    """Return about N_TICKS round numbers from ``low`` to ``high``."""
    rough = (high - low) / N_TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * times for times in (1, 2, 5, 10) if power * times >= rough)
    first = math.ceil(low / step)
    return [step * n for n in range(first, math.floor(high / step) + 1)]


def _tag(name: str, **attributes: Any) -> str:
    given = "".join(
        f' {key}="{html.escape(f"{value:.1f}" if isinstance(value, float) and key != "opacity" else str(value))}"'
        for key, value in attributes.items()
    )
    return f"<{name}{given}/>"


def _text(text: str, x: float, y: float, anchor: str = "start", **attributes: Any) -> str:
    opened = _tag("text", x=float(x), y=float(y), **{"text-anchor": anchor, "fill": "currentColor"}, **attributes)
    return f"{opened.removesuffix('/>')}>{html.escape(visible(text))}</text>"
