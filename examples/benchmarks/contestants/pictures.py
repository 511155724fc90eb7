"""Two pictures of the rows of one network: accuracy against the bytes of the file, and against the time of a call."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from statistics import mean

AXES = {"n_bytes": "bytes of the smallest file", "ms": "milliseconds of one image, one thread"}
MARKERS = "osD^vP*X<>hpd8"


def curves(rows: Iterable[dict], key: str) -> dict[str, list[tuple[float, float]]]:
    """Return the points of each contestant: the mean of a value and of the accuracy in percent, over seeds.

    Example:
        >>> curves([{"contestant": "a", "setting": "1", "n_bytes": 9, "accuracy": 0.5}], "n_bytes")
        {'a': [(9, 50.0)]}
    """
    groups: dict[tuple[str, str], list[dict]] = {}
    for row in rows:
        if "failed" not in row:
            groups.setdefault((row["contestant"], row["setting"]), []).append(row)
    found: dict[str, list[tuple[float, float]]] = {}
    for (name, _), runs in groups.items():
        found.setdefault(name, []).append((mean(r[key] for r in runs), 100 * mean(r["accuracy"] for r in runs)))
    return {name: sorted(points) for name, points in found.items()}


def draw(rows: Iterable[dict], key: str, path: Path, least: float = 85.0) -> None:
    """Write the picture of accuracy against a value, without what is less accurate than ``least`` percent."""
    from matplotlib.figure import Figure

    axes = (figure := Figure((8, 5), layout="constrained")).subplots()
    for (name, points), marker in zip(sorted(curves(rows, key).items()), MARKERS, strict=False):
        shown = [point for point in points if point[1] >= least]
        if shown:
            is_ours = name == "blocks"
            line = {"linewidth": 2.5, "color": "black"} if is_ours else {"linewidth": 1.0}
            axes.plot(*zip(*shown, strict=True), marker=marker, label="ours" if is_ours else name, **line)
    axes.set_xscale("log")
    axes.set_xlabel(AXES[key])
    axes.set_ylabel("test accuracy, %")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)
