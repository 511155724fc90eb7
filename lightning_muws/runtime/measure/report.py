"""Numbers: what each kernel took, what won, and what the whole network gained. Knows nothing of how it was measured."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lightning_muws.errors import SettingError, StateError
from lightning_muws.runtime.kernels import DENSE
from lightning_muws.runtime.native.library import level

if TYPE_CHECKING:
    from rich.table import Table

FORMAT = 1  # of the JSON file
MAX_BYTES = 1 << 26  # of a stored report; a larger file is no report


@dataclass(frozen=True)
class Machine:
    """What a measurement is true of; times of another machine choose nothing. ``native``: its instruction set."""

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
    """What was measured of one layer.

    Args:
        name: Its name in the model.
        layer: Its type and sizes.
        inputs: The shapes that it was called with.
        block_shape: ``(outputs, inputs)`` of its blocks, as planned, stored or found.
        n_weights: Weights.
        n_nonzero: Weights that are not zero.
        times: Median seconds of each kernel, all calls of one forward together.
        errors: ``max |y - y64| / max |y64|`` of each kernel, against float64.
        winner: The kernel that stays.
        refused: Kernels that were built and not used, each with the reason.
        reason: Why the layer was left alone; empty where it was measured.
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

    @property
    def sparsity(self) -> float:
        """Share of weights that are zero, in [0, 1]."""
        return 1 - self.n_nonzero / max(1, self.n_weights)

    @property
    def theory(self) -> float:
        """Return ``1 / (1 - sparsity)``: the gain if only multiplications took time; inf where all is zero."""
        return self.n_weights / self.n_nonzero if self.n_nonzero else float("inf")

    @property
    def gain(self) -> float:
        """Seconds of the best dense form over those of the winner."""
        base = min((self.times[name] for name in DENSE if name in self.times), default=0.0)
        return base / self.times[self.winner] if base and self.times.get(self.winner) else 1.0


@dataclass(frozen=True)
class SpeedReport:
    """What ``accelerate`` measured and chose.

    Args:
        machine: Where.
        inputs: Shapes of the example's tensors.
        min_gain: What a kernel had to win by.
        dtype: The lowest precision that was allowed; empty: that of the model.
        layers: Each Linear and convolution that the example came through, and those left alone.
        times: Median seconds of the whole network: dense forms, the accelerated ones, and ``bf16`` to compare with.
        errors: Relative error of each form against float64.
        best_dense: The fastest dense form.
        chosen: The form that came back; ``dense`` is the model as it was.
        speedup: The best dense form's seconds over those of what came back, median over rounds; 1 where it is dense.
        n_folded: Batch norms folded into the layer before them.
        note: What a reader has to know: why it stayed dense, or that a stored choice was used.
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

    @property
    def is_faster(self) -> bool:
        """Whether an accelerated network came back."""
        return self.chosen != "dense"

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain dicts, lists, strings and numbers, ready for JSON."""
        return {"format": FORMAT, **asdict(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SpeedReport:
        """Return the report that :meth:`to_dict` gave.

        Raises:
            SettingError: It is none.
        """
        try:
            if values["format"] != FORMAT:
                raise SettingError(
                    f"this speed report is of format {values['format']!r}, and {FORMAT} is read here: measure again"
                )
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
            SettingError: The file is none of them.
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
        """Return what came of it in one sentence."""
        if not self.is_faster:
            return f"the model came back as it was: {self.note}"
        error = self.errors.get(self.chosen, float("nan"))
        return (
            f"{self.speedup:.2f} times faster than the best dense form ({self.best_dense}), relative error {error:.1e}"
            + (f"; {self.note}" if self.note else "")
        )

    def markdown(self) -> str:
        """Return the table of layers and the summary as markdown."""
        lines = ["| " + " | ".join(HEADERS) + " |", "|---" * len(HEADERS) + "|"]
        lines += ["| " + " | ".join(_cells(layer)) + " |" for layer in self.layers]
        whole = ", ".join(f"{name} {1e3 * s:.3f} ms" for name, s in self.times.items())
        return "\n".join([*lines, "", f"whole network: {whole}; {self.summary()}", ""])

    def __rich__(self) -> Table:
        from rich.table import Table

        m = self.machine
        whole = ", ".join(f"{name} {1e3 * s:.3f}" for name, s in self.times.items())
        table = Table(
            title=f"Speed on {m.cpu} ({m.capability}, native kernels: {m.native}), {m.device}, {m.threads} thread(s), "
            f"torch {m.torch_version}",
            caption=f"whole network, ms: {whole}; {self.summary()}. "
            "Layers in ms; theory is 1 / (1 - zeros), gain is over the best dense form; bf16 and int8 only compare.",
        )
        for i, header in enumerate(HEADERS):
            table.add_column(header, justify="right" if i > 1 else "left", overflow="fold")
        for layer in self.layers:
            table.add_row(*_cells(layer))
        return table

    def print(self) -> None:
        """Print the tables to the terminal."""
        from rich.console import Console

        console = Console()
        (console if console.is_terminal else Console(width=180)).print(self)


HEADERS = ("layer", "type", "block", "zeros", "kernels, ms", "winner", "theory", "gain", "error")


def _cells(layer: LayerSpeed) -> list[str]:
    if layer.reason:
        return [layer.name, layer.layer, "", "", layer.reason, "", "", "", ""]
    times = ", ".join(f"{name} {1e3 * s:.3f}" for name, s in layer.times.items())
    return [
        layer.name,
        layer.layer,
        "x".join(map(str, layer.block_shape)),
        f"{layer.sparsity:.0%}",
        times,
        layer.winner,
        f"{layer.theory:.1f}",
        f"{layer.gain:.2f}",
        f"{layer.errors.get(layer.winner, float('nan')):.1e}",
    ]


def _shapes(values: Any) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(int(n) for n in shape) for shape in values)
