"""The speed report: times and errors of each layer's kernels and of the whole network. Measures nothing itself."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from lightning_muws.errors import SettingError, StateError
from lightning_muws.runtime.kernels import DENSE
from lightning_muws.runtime.measure.tables import markdown, speed_tables
from lightning_muws.runtime.native.library import level
from lightning_muws.tables import Table, Tabular

FORMAT = 1  # of the JSON file
MAX_BYTES = 1 << 26  # of a saved report; a larger file is none
WIDE = 150  # characters of a line from which on the tables have the time of every kernel


@dataclass(frozen=True)
class Machine:
    """The machine of a measurement. Times measured on one machine choose nothing on another.

    Args:
        cpu: Its model name.
        capability: What torch calls its instruction set.
        system: The operating system.
        device: ``cpu``, or the name of the GPU.
        threads: torch's threads.
        torch_version: The version of torch.
        native: The instruction set of the native kernels, or ``none``.
    """

    cpu: str
    capability: str
    system: str
    device: str
    threads: int
    torch_version: str
    native: str

    @classmethod
    def here(cls, device: torch.device) -> Machine:
        """Return this machine, with torch's threads as they are set now."""
        cpuinfo = Path("/proc/cpuinfo")
        lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
        cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        return cls(
            cpu=cpu or platform.processor() or platform.machine(),
            capability=torch.backends.cpu.get_cpu_capability(),
            system=platform.system(),
            device=name,
            threads=torch.get_num_threads(),
            torch_version=str(torch.__version__),
            native=level() or "none",
        )


@dataclass(frozen=True)
class LayerSpeed:
    """The measurements of one layer.

    Args:
        name: Its name in the model.
        layer: Its type and sizes.
        inputs: The input shapes that it was called with.
        block_shape: ``(outputs, inputs)`` of its blocks, as given or inferred.
        n_weights: Weights.
        n_nonzero: Weights that are not zero.
        times: Median seconds of each kernel, over all calls in one forward.
        errors: ``max |y - y64| / max |y64|`` of each kernel, against float64.
        winner: The kernel that was chosen.
        refused: Why a kernel was built but not timed, by kernel.
        rounding: How 8-bit inputs are rounded, if the winner has such: ``range``, ``percentile 99.9``, ``mse`` or
            ``dynamic``.
        reason: Why the layer was not measured; empty if it was.
    """

    name: str
    layer: str
    inputs: tuple[tuple[int, ...], ...] = ()
    block_shape: tuple[int, int] = (1, 1)
    n_weights: int = 0
    n_nonzero: int = 0
    times: Mapping[str, float] = field(default_factory=dict)
    errors: Mapping[str, float] = field(default_factory=dict)
    winner: str = "dense"
    refused: Mapping[str, str] = field(default_factory=dict)
    reason: str = ""
    rounding: str = ""

    @property
    def sparsity(self) -> float:
        """Share of weights that are zero, in [0, 1]."""
        return 1 - self.n_nonzero / max(1, self.n_weights)

    @property
    def theory(self) -> float:
        """Return ``1 / (1 - sparsity)``: the gain if only multiplications took time; inf if all weights are zero."""
        return self.n_weights / self.n_nonzero if self.n_nonzero else float("inf")

    @property
    def gain(self) -> float:
        """Seconds of the best dense form over those of the winner."""
        base = min((self.times[name] for name in DENSE if name in self.times), default=0.0)
        return base / self.times[self.winner] if base and self.times.get(self.winner) else 1.0


@dataclass(frozen=True)
class SpeedReport(Tabular):
    """What ``accelerate`` measured and chose. ``print()`` shows it; a notebook shows it as a table.

    Args:
        machine: The machine.
        inputs: Shapes of the example's tensors.
        min_gain: How many times faster than dense a kernel had to be.
        dtype: The lowest precision allowed; empty: that of the model.
        layers: Every Linear and convolution, measured or not.
        times: Median seconds of the whole network: dense forms, accelerated forms, and ``bf16`` for comparison.
        errors: Relative error of each form against float64.
        best_dense: The fastest dense form.
        chosen: The form that was returned; ``dense`` is the unchanged model.
        speedup: Seconds of the best dense form over those of the chosen one, median over rounds; 1 if that is dense.
        n_folded: Batch norms folded into the layer before them.
        note: Why the model stayed dense, or that a saved plan was used.
        max_error: The relative error that a layer of lower precision may have; 0 if none may win.
    """

    machine: Machine
    inputs: tuple[tuple[int, ...], ...]
    min_gain: float
    dtype: str
    layers: tuple[LayerSpeed, ...] = ()
    times: Mapping[str, float] = field(default_factory=dict)
    errors: Mapping[str, float] = field(default_factory=dict)
    best_dense: str = "dense"
    chosen: str = "dense"
    speedup: float = 1.0
    n_folded: int = 0
    note: str = ""
    max_error: float = 0.0

    @property
    def is_faster(self) -> bool:
        """Whether ``accelerate`` returned an accelerated network."""
        return self.chosen != "dense"

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain dicts, lists, strings and numbers, ready for JSON."""
        return {"format": FORMAT, **asdict(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SpeedReport:
        """Return the report that :meth:`to_dict` made.

        Raises:
            SettingError: ``values`` are no such report.
        """
        try:
            if values["format"] != FORMAT:
                raise SettingError(f"this speed report is of format {values['format']!r}, not {FORMAT}: measure again")
            kept = {f.name: values[f.name] for f in fields(cls)}
            kept["machine"] = Machine(**values["machine"])
            kept["inputs"] = _shapes(values["inputs"])
            kept["layers"] = tuple(
                LayerSpeed(**{**v, "inputs": _shapes(v["inputs"]), "block_shape": tuple(v["block_shape"])})
                for v in values["layers"]
            )
            return cls(**kept)
        except (AttributeError, KeyError, TypeError) as error:
            raise SettingError(f"this is no speed report ({error!r}): give what SpeedReport.save wrote") from None

    def save(self, path: str | Path) -> None:
        """Write the report as JSON, for ``accelerate(..., plan=path)``."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> SpeedReport:
        """Return the report that :meth:`save` wrote.

        Raises:
            SettingError: The file is no speed report.
            StateError: The file cannot be read.
        """
        try:
            if Path(path).stat().st_size > MAX_BYTES:
                raise SettingError(f"{path} is larger than any speed report: give what SpeedReport.save wrote")
            values = json.loads(Path(path).read_text())
        except OSError as error:
            raise StateError(f"{path} cannot be read ({error.strerror}): give the path of a saved report") from None
        except (ValueError, RecursionError) as error:
            raise SettingError(f"{path} is no speed report ({error}): give what SpeedReport.save wrote") from None
        return cls.from_dict(values)

    def summary(self) -> str:
        """Return the result in one sentence."""
        if not self.is_faster:
            return f"the model came back unchanged: {self.note}"
        error = self.errors.get(self.chosen, float("nan"))
        return (
            f"{self.speedup:.2f} times faster than the best dense form ({self.best_dense}), relative error {error:.1e}"
            + (f"; {self.note}" if self.note else "")
        )

    def markdown(self) -> str:
        """Return the table of layers, the times of the whole network and the summary as Markdown."""
        return markdown(self)

    def tables(self) -> list[Table]:
        """Return the tables with the time of every kernel."""
        return speed_tables(self, with_kernels=True)

    def text(self, width: int | None = None) -> str:
        """Return the tables for this width; from ``WIDE`` characters on they have the time of every kernel."""
        found = speed_tables(self, with_kernels=width is None or width >= WIDE)
        return "\n\n".join(table.text(width) for table in found)


def _shapes(values: Any) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(int(n) for n in shape) for shape in values)
