"""Shows a speed report: as tables for a terminal of any width, as HTML for a notebook, and as Markdown."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import RenderableType

    from lightning_muws.runtime.measure.report import LayerSpeed, SpeedReport

WIDE_HEADERS = ("layer", "type", "block", "zeros", "kernels, ms", "winner", "gain", "theory", "error")
# The columns of a layer, by the least width of the terminal.
HEADERS = {
    150: WIDE_HEADERS,
    100: ("layer", "type", "block", "zeros", "winner", "ms", "gain", "theory", "error"),
    0: ("layer", "type", "block", "zeros", "winner", "ms", "gain"),
}
FORM_HEADERS = ("whole network", "ms", "error")
TEXT_COLUMNS = frozenset({"layer", "type", "kernels, ms", "winner", "whole network"})
LEGEND = "Times are medians. Gain is over the layer's best dense form. bf16 and int8 are for comparison."
THEORY = " Theory is 1 / (1 - zeros). Errors are relative to float64."


def terminal_tables(report: SpeedReport, width: int) -> list[RenderableType]:
    """Return what rich prints: layers, layers left alone, whole-network times, summary; for ``width`` columns."""
    from rich.padding import Padding
    from rich.text import Text

    headers = HEADERS[next(least for least in HEADERS if width >= least)]
    parts: list[RenderableType] = [Text(title(report), style="bold")]
    if layers := _measured(report):
        parts.append(_rich_table(headers, [_cells(layer, headers) for layer in layers]))
    parts += [Padding(Text(line), (0, 0, 0, 1)) for line in _left_alone(report)]
    parts.append(_rich_table(FORM_HEADERS, _forms(report)))
    legend = LEGEND + (THEORY if "theory" in headers else "")
    parts += [Text(f"{report.summary()}."), Text(legend, style="dim")]
    return parts


def html_tables(report: SpeedReport) -> str:
    """Return the same as HTML, every kernel's time included."""
    parts = [f"<b>{html.escape(title(report))}</b>"]
    if layers := _measured(report):
        parts.append(_html_table(WIDE_HEADERS, [_cells(layer, WIDE_HEADERS) for layer in layers]))
    parts += [f"<div>{html.escape(line)}</div>" for line in _left_alone(report)]
    parts.append(_html_table(FORM_HEADERS, _forms(report)))
    parts += [f"<div>{html.escape(report.summary())}.</div>", f"<small>{html.escape(LEGEND + THEORY)}</small>"]
    return "\n".join(parts)


def markdown(report: SpeedReport) -> str:
    """Return the layers' table, the whole-network times and the summary as Markdown."""
    rows = [_cells(layer, WIDE_HEADERS) for layer in _measured(report)]
    lines = ["| " + " | ".join(WIDE_HEADERS) + " |", "|---" * len(WIDE_HEADERS) + "|"]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    whole = ", ".join(f"{name} {1e3 * seconds:.3f} ms" for name, seconds in report.times.items())
    alone = [f"- {line}" for line in _left_alone(report)]
    return "\n".join([*lines, "", *alone, *([""] if alone else []), f"whole network: {whole}; {report.summary()}", ""])


def title(report: SpeedReport) -> str:
    """Return the machine in one line."""
    m = report.machine
    device = "" if m.device == "cpu" else f", {m.device}"
    threads = f"{m.threads} thread" + ("s" if m.threads != 1 else "")
    return f"Speed on {m.cpu}{device}, {threads}, torch {m.torch_version}, native kernels: {m.native}"


def _measured(report: SpeedReport) -> list[LayerSpeed]:
    return [layer for layer in report.layers if not layer.reason]


def _left_alone(report: SpeedReport) -> list[str]:
    """Return a line for each reason why layers were not measured."""
    names: dict[str, list[str]] = {}
    for layer in report.layers:
        if layer.reason:
            names.setdefault(layer.reason, []).append(layer.name or layer.layer)
    return [f"not measured, as {reason}: {', '.join(found)}" for reason, found in names.items()]


def _cells(layer: LayerSpeed, headers: Sequence[str]) -> tuple[str, ...]:
    ms = {name: f"{1e3 * seconds:.3f}" for name, seconds in layer.times.items()}
    cells = {
        "layer": layer.name or "(model)",
        "type": layer.layer,
        "block": "x".join(map(str, layer.block_shape)),
        "zeros": f"{layer.sparsity:.0%}",
        "kernels, ms": ", ".join(f"{name} {time}" for name, time in ms.items()),
        "winner": layer.winner,
        "ms": ms.get(layer.winner, ""),
        "gain": f"{layer.gain:.2f}",
        "theory": f"{layer.theory:.1f}",
        "error": f"{layer.errors.get(layer.winner, float('nan')):.1e}",
    }
    return tuple(cells[header] for header in headers)


def _forms(report: SpeedReport) -> list[tuple[str, ...]]:
    marks = {report.best_dense: " (best dense)", report.chosen: " (chosen)"}
    if report.chosen == "dense":
        marks = {report.best_dense: " (best dense)"}
    return [
        (f"{name}{marks.get(name, '')}", f"{1e3 * seconds:.3f}", f"{report.errors.get(name, float('nan')):.1e}")
        for name, seconds in report.times.items()
    ]


def _rich_table(headers: Sequence[str], rows: Sequence[tuple[str, ...]]) -> RenderableType:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for header in headers:
        is_text = header in TEXT_COLUMNS
        folds = header in ("layer", "type", "kernels, ms")  # the others keep their width
        table.add_column(header, justify="left" if is_text else "right", overflow="fold", no_wrap=not folds)
    for row in rows:
        table.add_row(*row)
    return table


def _html_table(headers: Sequence[str], rows: Sequence[tuple[str, ...]]) -> str:
    def line(tag: str, cells: Sequence[str]) -> str:
        style = {True: ' style="text-align:left"', False: ' style="text-align:right"'}
        inside = "".join(
            f"<{tag}{style[header in TEXT_COLUMNS]}>{html.escape(cell)}</{tag}>"
            for header, cell in zip(headers, cells, strict=True)
        )
        return f"<tr>{inside}</tr>"

    body = "".join(line("td", row) for row in rows)
    return f"<table><thead>{line('th', headers)}</thead><tbody>{body}</tbody></table>"
