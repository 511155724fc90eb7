"""Shows a speed report: as tables for a terminal of any width or a notebook, and as Markdown."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_muws.tables import Column, Table

if TYPE_CHECKING:
    from lightning_muws.runtime.measure.report import LayerSpeed, SpeedReport

COLUMNS = (
    Column("layer", room=20),
    Column("type"),
    Column("block"),
    Column("zeros"),
    Column("winner", room=12),
    Column("ms"),
    Column("gain"),
    Column("theory", drop=2),
    Column("error", drop=1),
)
FORMS = (Column("whole network", room=30), Column("ms"), Column("error"))
HEADERS = ("layer", "type", "block", "zeros", "kernels, ms", "winner", "gain", "theory", "error")  # in Markdown
LEGEND = (
    "ms: median. gain: over the layer's best dense form. theory: 1 / (1 - zeros). error: relative to float64. "
    "bf16 and int8 are for comparison."
)


def speed_tables(report: SpeedReport, with_kernels: bool) -> list[Table]:
    """Return the table of the layers, if any was measured, and that of the whole network with its summary.

    Args:
        report: The report.
        with_kernels: Whether a line below each layer has the times of all its kernels.
    """
    rows: list[tuple[str, ...]] = []
    for layer in _measured(report):
        cells = _cells(layer)
        rows.append(tuple(cells[column.header] for column in COLUMNS))
        if with_kernels:
            rows.append(("", f"kernels, ms: {cells['kernels, ms']}"))
    layers = [Table(title(report), COLUMNS, rows)] if rows else []
    notes = [*_left_alone(report), *_not_rounded(report), f"{report.summary()}.", LEGEND]
    return [*layers, Table("" if layers else title(report), FORMS, _forms(report), notes=notes)]


def markdown(report: SpeedReport) -> str:
    """Return the layers' table, the whole-network times and the summary as Markdown."""
    rows = [[_cells(layer)[header] for header in HEADERS] for layer in _measured(report)]
    lines = ["| " + " | ".join(HEADERS) + " |", "|---" * len(HEADERS) + "|"]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    whole = ", ".join(f"{name} {1e3 * seconds:.3f} ms" for name, seconds in report.times.items())
    alone = [f"- {line}" for line in [*_left_alone(report), *_not_rounded(report)]]
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


def _not_rounded(report: SpeedReport) -> list[str]:
    """Return a line for each reason why layers are not in 8 bits, if the report allows that."""
    names: dict[str, list[str]] = {}
    for layer in _measured(report):
        if report.dtype != "int8" or layer.winner in ("native_int8", "int8"):
            continue
        reason = layer.refused.get("native_int8", "another kernel is faster")
        names.setdefault(reason, []).append(f"{layer.name or layer.layer} ({layer.winner})")
    return [f"not in 8 bits, as {reason}: {', '.join(found)}" for reason, found in names.items()]


def _cells(layer: LayerSpeed) -> dict[str, str]:
    """Return the cells of a layer, by their headings."""
    ms = {name: f"{1e3 * seconds:.3f}" for name, seconds in layer.times.items()}
    return {
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


def _forms(report: SpeedReport) -> list[tuple[str, ...]]:
    marks = {report.best_dense: " (best dense)", report.chosen: " (chosen)"}
    if report.chosen == "dense":
        marks = {report.best_dense: " (best dense)"}
    return [
        (f"{name}{marks.get(name, '')}", f"{1e3 * seconds:.3f}", f"{report.errors.get(name, float('nan')):.1e}")
        for name, seconds in report.times.items()
    ]
