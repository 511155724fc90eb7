"""Tables of text that fit the terminal, and the same tables as HTML for notebooks. Needs nothing but Python."""

from __future__ import annotations

import html
import os
import shutil
import sys
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

GAP = "  "
LEAST_NAME = 8  # characters that a name is shortened to at most
NOTE_WIDTH = 78  # characters of the lines of notes below a table that is narrower


@dataclass(frozen=True)
class Column:
    """One column of a :class:`Table`.

    Args:
        header: Its heading.
        drop: 0 if the column is always shown. Else it is left out where the terminal is too narrow for all columns;
            the one with the largest number goes first.
        room: 0 for numbers: they are aligned to the right and never shortened. Else the column holds names, aligned to
            the left. Other columns are left out until names of this many characters fit; names are shortened after
            that.
    """

    header: str
    drop: int = 0
    room: int = 0


@dataclass(frozen=True)
class Table:
    """A table of strings.

    Args:
        title: Printed above the table.
        columns: The columns.
        rows: The cells, one string for each column. The last cell of a shorter row reaches to the end of its line, and
            continues on further lines.
        total: The last row, below a line; empty for none.
        notes: Sentences printed below the table, each as a paragraph.
    """

    title: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[str]]
    total: Sequence[str] = ()
    notes: Sequence[str] = ()

    def text(self, width: int | None = None) -> str:
        """Return the table as lines of at most ``width`` characters where its numbers allow that; None: no limit.

        A narrow table leaves out the columns that may be left out, names them in a note, and shortens names.
        """
        header = [column.header for column in self.columns]
        rows = [[visible(cell) for cell in row] for row in self.rows]
        total = [visible(cell) for cell in self.total]

        def cells(row: Sequence[str]) -> Sequence[str]:
            return row if len(row) == len(header) else row[:-1]

        longest = {}
        for i, column in enumerate(self.columns):
            lengths = [len(row[i]) for row in map(cells, (*rows, total)) if i < len(row)]
            if any(lengths) or not column.drop:
                longest[i] = max([len(column.header), *lengths])
        widths = self._widths(longest, width)

        def line(row: Sequence[str]) -> str:
            own = cells(row)
            aligned = "".join(self._cell(i, own[i], n) + GAP for i, n in widths.items() if i < len(own))
            rest = "".join(row[len(own) :])
            if rest and width is not None:
                room = max(LEAST_NAME, width - len(aligned))
                rest = f"\n{' ' * len(aligned)}".join(_wrapped(rest, room))
            return (aligned + rest).rstrip()

        rule = GAP.join("-" * n for n in widths.values())
        left_out = [header[i] for i in longest if i not in widths]
        notes = [*self.notes, f"Not shown at this width: {', '.join(left_out)}."] if left_out else self.notes
        wrap = max(len(rule), NOTE_WIDTH)
        wrap = wrap if width is None else min(wrap, width)
        return "\n".join(
            [
                *_wrapped(visible(self.title), wrap),
                line(header),
                rule,
                *map(line, rows),
                *([rule, line(total)] if total else []),
                *(part for note in notes for part in _wrapped(visible(note), wrap)),
            ]
        )

    def html(self) -> str:
        """Return the whole table as HTML."""

        def row(cells: Sequence[str], tag: str) -> str:
            spans = [1] * (len(cells) - 1) + [len(self.columns) - len(cells) + 1]
            inner = ""
            for column, cell, span in zip(self.columns, cells, spans, strict=False):
                side = "left" if column.room or span > 1 else "right"
                inner += f'<{tag} colspan="{span}" style="text-align:{side}">{html.escape(visible(cell))}</{tag}>'
            return f"<tr>{inner}</tr>"

        head = row([column.header for column in self.columns], "th")
        body = "".join(row(cells, "td") for cells in self.rows)
        foot = f"<tfoot>{row(self.total, 'th')}</tfoot>" if self.total else ""
        notes = "".join(f"<p>{html.escape(visible(note))}</p>" for note in self.notes)
        title = f"<p><strong>{html.escape(visible(self.title))}</strong></p>" if self.title else ""
        return f"<div>{title}<table><thead>{head}</thead><tbody>{body}</tbody>{foot}</table>{notes}</div>"

    def _cell(self, i: int, cell: str, width: int) -> str:
        """Return a cell of the column ``i``, aligned."""
        return shorten(cell, width).ljust(width) if self.columns[i].room else cell.rjust(width)

    def _widths(self, longest: Mapping[int, int], width: int | None) -> dict[int, int]:
        """Return the characters of each column that is shown, by index; those not shown are missing."""
        widths = dict(longest)
        if width is None:
            return widths
        wanted = {i: min(n, self.columns[i].room or n) for i, n in widths.items()}
        while _total(wanted.values()) > width and any(self.columns[i].drop for i in wanted):
            last = max(wanted, key=lambda i: self.columns[i].drop)
            del wanted[last], widths[last]
        while _total(widths.values()) > width:
            names = {i: n for i, n in widths.items() if self.columns[i].room and n > LEAST_NAME}
            if not names:
                break
            widths[max(names, key=names.__getitem__)] -= 1
        return widths


class Tabular:
    """Base of the reports: ``print`` shows their tables, and so do notebooks and the consoles of ``rich``."""

    def tables(self) -> Sequence[Table]:
        """Return the tables that show the report."""
        raise NotImplementedError

    def print(self) -> None:
        """Print the tables."""
        if sys.stdout is not None:  # as print does
            sys.stdout.write(f"{self}\n")

    def text(self, width: int | None = None) -> str:
        """Return the tables as lines of at most ``width`` characters where their numbers allow that; None: no limit."""
        return "\n\n".join(table.text(width) for table in self.tables())

    def __str__(self) -> str:
        return self.text(terminal_width())

    def _repr_html_(self) -> str:
        return "".join(table.html() for table in self.tables())

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        from rich.text import Text

        yield Text(self.text(options.max_width))


def terminal_width() -> int | None:
    """Return the width in characters of the terminal that standard output goes to, or of ``COLUMNS``; else None."""
    columns = os.environ.get("COLUMNS", "")
    if columns.isdecimal() and int(columns) > 0:
        return int(columns)
    is_terminal = sys.stdout is not None and sys.stdout.isatty()  # None where the caller has closed it
    return shutil.get_terminal_size().columns if is_terminal else None


def visible(text: str) -> str:
    """Return text with control characters written as escapes, as a file from a stranger may hold any.

    Example:
        >>> visible("two" + chr(0x2028) + "lines") == "two" + chr(92) + "u2028lines"
        True
    """
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def shorten(name: str, width: int) -> str:
    """Return a name in at most ``width`` characters.

    The parts between its dots become initials until it fits, with the numbers at their ends: first the inner parts,
    then the last one, the first one, and the one before the last. If that is not enough, the beginning is left out,
    where the layers of one network differ least; or the middle of a name without inner parts. Words before the name
    stay.

    Example:
        >>> shorten("bert.encoder.layer.11.output.dense.weight", 30)
        'bert.e.l.11.o.dense.weight'
        >>> shorten("bert.encoder.layer.11.output.dense.weight", 20)
        'b.e.l.11.o.dense.w'
    """
    words, space, last = name.rpartition(" ")
    if len(name) > width and width - len(words + space) >= LEAST_NAME and space:
        return words + space + shorten(last, width - len(words + space))
    parts = name.split(".")
    inner = list(range(1, len(parts) - 2))
    for i in (*inner, -1, 0, -2) if len(parts) > 2 else ():
        if len(".".join(parts)) <= width:
            break
        stem = parts[i].rstrip("0123456789")
        parts[i] = stem[:1] + parts[i][len(stem) :]
    short = ".".join(parts)
    if len(short) <= width:
        return short
    dots = "..."[: max(0, width - 2)]
    tail = width - len(dots) if inner else (width - len(dots) + 1) // 2
    return short[: width - len(dots) - tail] + dots + short[len(short) - tail :]


def _total(widths: Iterable[int]) -> int:
    """Return the characters of a line."""
    found = list(widths)
    return sum(found) + len(GAP) * (len(found) - 1)


def _wrapped(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False)
