"""One HTML page that needs no other file: tables, block maps, bars and charts; no script, no network."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from lightning_muws.pictures import data_url, png
from lightning_muws.tables import Table, shorten, visible

LONGEST = 300  # characters of a text that are shown: a file may hold names of megabytes
PIXELS = 288  # of the longer side of a picture on the page, about
# The browser refuses every request, also one that markup in a name would make if it were not escaped.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
STYLE = """
:root { color-scheme: light dark; --line: #8884; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1080px; margin: 2em auto; padding: 0 1em; }
h1 { font-size: 1.5em; overflow-wrap: anywhere; } h2 { font-size: 1.15em; margin-top: 2em; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13px; }
td, th { padding: 3px 10px; border-bottom: 1px solid var(--line); overflow-wrap: anywhere; min-width: 6em; }
[style*="text-align:right"] { white-space: nowrap; min-width: 0; }
.wide { overflow-x: auto; } p { overflow-wrap: anywhere; max-width: 60em; }
.facts { display: flex; flex-wrap: wrap; gap: 12px; padding: 0; }
.facts div { border: 1px solid var(--line); border-radius: 8px; padding: 8px 14px; }
.facts b { display: block; font-size: 1.3em; }
.bar { background: #3d5a80; height: 12px; min-width: 1px; } .bars td:last-child { width: 300px; }
svg { max-width: 720px; width: 100%; font: 12px system-ui, sans-serif; }
"""
# a notebook has no style sheet of ours
KEY = "display:inline-block;width:1em;height:1em;border:1px solid #8888;vertical-align:-2px;margin:0 4px 0 14px"
ROW = "display:flex;flex-wrap:wrap;gap:20px;align-items:flex-end"
IMAGE = "image-rendering:pixelated;border:1px solid #8884;display:block;max-width:none"
CAPTION = "font-size:12px;overflow-wrap:anywhere"
Picture = tuple[str, str, NDArray[np.uint8]]  # the name, what is below it, and the pixels ``(height, width, 3)``


@dataclass
class Page:
    """A page that grows part by part. All texts are escaped: a file from a stranger may hold any name.

    Args:
        title: Its title.

    Example:
        >>> page = Page("<b>")
        >>> page.heading("Part")
        >>> "<h1>&lt;b&gt;</h1>" in page.html(), "<script" in page.html()
        (True, False)
    """

    title: str
    parts: list[str] = field(default_factory=list)

    def heading(self, text: str) -> None:
        """Begin a part of the page."""
        self.parts.append(f"<h2>{escaped(text)}</h2>")

    def text(self, text: str) -> None:
        """Add a paragraph."""
        self.parts.append(f"<p>{escaped(text, 20 * LONGEST)}</p>")

    def facts(self, facts: Iterable[tuple[str, str]]) -> None:
        """Add numbers, each with what it is."""
        boxes = "".join(f"<div><b>{escaped(value)}</b>{escaped(name)}</div>" for name, value in facts)
        self.parts.append(f'<div class="facts">{boxes}</div>')

    def table(self, table: Table) -> None:
        """Add a table with its notes."""
        self.parts.append(f'<div class="wide">{table.html()}</div>')

    def bars(self, rows: Sequence[tuple[str, str, float]]) -> None:
        """Add a table of names and values, each with a bar.

        Args:
            rows: The name, the value as text, and the value.
        """
        most = max((value for _, _, value in rows), default=0.0) or 1.0
        lines = "".join(
            f'<tr><td>{escaped(name)}</td><td style="text-align:right">{escaped(text)}</td>'
            f'<td><div class="bar" style="width:{100 * value / most:.1f}%"></div></td></tr>'
            for name, text, value in rows
        )
        self.parts.append(f'<div class="wide"><table class="bars">{lines}</table></div>')

    def legend(self, meanings: Iterable[tuple[str, tuple[int, int, int]]]) -> None:
        """Add the meaning of colours ``(red, green, blue)``."""
        self.parts.append(keys(meanings))

    def pictures(self, pictures: Iterable[Picture]) -> None:
        """Add pictures with sharp pixels."""
        self.parts.append(figures(pictures))

    def chart(self, svg: str) -> None:
        """Add an SVG element of :mod:`lightning_muws.pictures`."""
        self.parts.append(svg)

    def html(self) -> str:
        """Return the page."""
        title = escaped(self.title)
        return (
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{title}</title><style>{STYLE}</style></head>\n<body><h1>{title}</h1>\n"
            + "\n".join(self.parts)
            + "\n</body></html>\n"
        )


def escaped(text: str, longest: int = LONGEST) -> str:
    """Return text for HTML: shortened, control characters as escapes, and no markup."""
    return html.escape(visible(text if len(text) <= longest else text[:longest] + " ..."))


def keys(meanings: Iterable[tuple[str, tuple[int, int, int]]]) -> str:
    """Return the meaning of colours ``(red, green, blue)`` as HTML that needs no style sheet."""
    found = "".join(f'<span style="{KEY};background:rgb{colour}"></span>{escaped(name)}' for name, colour in meanings)
    return f"<p>{found}</p>"


def figures(pictures: Iterable[Picture]) -> str:
    """Return pictures with sharp pixels as HTML that needs no style sheet."""
    return f'<div style="{ROW}">{"".join(_figure(*picture) for picture in pictures)}</div>'


def _figure(name: str, below: str, pixels: NDArray[np.uint8]) -> str:
    height, width, _ = pixels.shape
    scale = PIXELS / max(height, width)
    if scale >= 1:
        scale = int(scale)
    size = f'width="{max(2, round(scale * width))}" height="{max(2, round(scale * height))}"'
    return (
        f'<figure style="margin:0;max-width:320px"><img {size} style="{IMAGE}" alt="block map" '
        f'src="{data_url(png(pixels))}"><figcaption style="{CAPTION}" title="{escaped(name)}">'
        f"<b>{escaped(shorten(name, 44))}</b><br>{escaped(below)}</figcaption></figure>"
    )
