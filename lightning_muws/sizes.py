"""export: one model in files of several sizes, with what each of them loses."""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from lightning_muws.artifact.load import Progress, load_compressed
from lightning_muws.artifact.save import save_compressed
from lightning_muws.calibration.batches import Forward
from lightning_muws.compression import compress
from lightning_muws.errors import SettingError
from lightning_muws.structure.cost import check_compression
from lightning_muws.structure.micro import MicroStructure
from lightning_muws.structure.plan import LayerRule
from lightning_muws.structure.structure import Structure
from lightning_muws.tables import Column, Table, Tabular


@dataclass(frozen=True)
class ExportedFile:
    """One file of an export.

    Args:
        path: The file.
        compression: What was requested.
        n_bytes: Bytes of the file.
        compression_ratio: Dense bytes over the bytes of the file; more is better.
        weight_error: ``|W - W'| / |W|`` of all weights of two or more axes together.
        error: The mean relative error of the layers' outputs on the calibration batches; NaN without calibration.
        score: What ``evaluate`` returned for the model loaded from the file; NaN without it.
    """

    path: str
    compression: float
    n_bytes: int
    compression_ratio: float
    weight_error: float
    error: float
    score: float


@dataclass(frozen=True)
class ExportReport(Tabular):
    """The files of an export; ``print`` and notebooks show them as a table.

    Args:
        files: The files, in the order of the request.
        dense_score: What ``evaluate`` returned for the given model; NaN without it.
    """

    files: tuple[ExportedFile, ...]
    dense_score: float

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain dicts, lists, strings and numbers; numbers that are NaN as None."""
        files = [{k: None if v != v else v for k, v in asdict(file).items()} for file in self.files]
        return {"files": files, "dense_score": None if math.isnan(self.dense_score) else self.dense_score}

    def tables(self) -> list[Table]:
        """Return the table of the files."""
        columns = [
            Column("file", room=24),
            Column("requested", drop=2),
            Column("bytes"),
            Column("ratio"),
            Column("weight error", drop=3),
            Column("output error", drop=1),
            Column("score"),
        ]
        rows = [
            (
                file.path,
                f"{file.compression:g}",
                f"{file.n_bytes:,}",
                f"{file.compression_ratio:.2f}",
                *(_number(x) for x in (file.weight_error, file.error, file.score)),
            )
            for file in self.files
        ]
        note = "errors: |W - W'| / |W|, and the mean |y - y'| / |y| of the layers; score: of the model that was loaded"
        if not math.isnan(self.dense_score):
            note += f"; the given model has {_number(self.dense_score)}"
        return [Table("", columns, rows, notes=[f"{note}."])]


def export(
    model: nn.Module,
    path: str | Path,
    compression: Iterable[float] = (10, 20, 40),
    calibration: Any = None,
    evaluate: Callable[[nn.Module], float] | None = None,
    *,
    structure: Structure = MicroStructure(),
    rules: Sequence[LayerRule] = (),
    forward: Forward | None = None,
    progress: Progress | None = None,
) -> ExportReport:
    """Write one model to a file of each size, and return a report of what each file loses.

    Each file is :func:`compress` and then ``save_compressed``. All files are made and evaluated in a temporary folder
    beside their place before the first one is moved there: an error leaves no file behind.

    Args:
        model: Any module, such as one that a callback trained; it stays as it is.
        path: A folder, which gets ``model_10x.muws`` and so on; or a file name with ``{compression}`` in it.
        compression: How many times smaller each file is, above 1.
        calibration: See :func:`compress`; the batches are read once.
        evaluate: Returns a score of a model; called with the given model and with the one loaded from each file.
        structure: See :func:`compress`.
        rules: See :func:`compress`.
        forward: See :func:`compress`.
        progress: See :func:`compress`.

    Raises:
        SettingError: A setting is not allowed, two sizes have one name, or one cannot be reached.
        PlanError: The rules do not fit the model, or no weight is covered.
        StateError: See :func:`compress`.

    Example:
        >>> from lightning_muws import export
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     report = export(nn.Linear(128, 128), folder, compression=[4, 8])
        ...     sorted(file.name for file in Path(folder).iterdir())
        ['model_4x.muws', 'model_8x.muws']
    """
    places = _places(path, compression)
    batches = (
        list(calibration) if isinstance(calibration, Iterable) and not isinstance(calibration, str) else calibration
    )
    found = []
    with tempfile.TemporaryDirectory(dir=places[0][1].parent, prefix=".export") as folder:
        for wanted, place in places:
            small, report = compress(
                model, wanted, batches, structure=structure, rules=rules, forward=forward, progress=progress
            )
            written = Path(folder) / place.name
            saved = save_compressed(small, written)
            score = math.nan
            if evaluate is not None:
                small.load_state_dict(load_compressed(written))
                score = float(evaluate(small))
            found.append(
                ExportedFile(
                    str(place), wanted, saved.n_bytes, saved.compression_ratio, report.weight_error, report.error, score
                )
            )
        dense_score = math.nan if evaluate is None else float(evaluate(copy.deepcopy(model)))
        for _, place in places:
            (Path(folder) / place.name).replace(place)
    return ExportReport(tuple(found), dense_score)


def _places(path: str | Path, compression: object) -> list[tuple[float, Path]]:
    """Return each requested size and its file.

    Raises:
        SettingError: A size is not allowed, there is none, two have one name, or their folder does not exist.
    """
    if isinstance(compression, (int, float, str)) or not isinstance(compression, Iterable):
        raise SettingError(f"compression={compression!r} is not allowed: give several sizes, such as [10, 20, 40]")
    sizes: list[Any] = list(compression)
    for size in sizes:
        check_compression(size)
    path = Path(path)
    pattern = path / "model_{compression}x.muws" if path.is_dir() else path
    places = [(float(size), Path(str(pattern).replace("{compression}", f"{size:g}"))) for size in sizes]
    if not places or len({place for _, place in places}) < len(places):
        raise SettingError(
            f"compression={sizes} and path={str(path)!r} give {len({place for _, place in places})} file names for "
            f"{len(places)} sizes: give different sizes, and a folder or a file name with {{compression}} in it"
        )
    if not places[0][1].parent.is_dir():
        raise SettingError(f"{places[0][1]} cannot be written: its folder does not exist")
    return places


def _number(x: float) -> str:
    return "" if math.isnan(x) else f"{x:.4g}"
