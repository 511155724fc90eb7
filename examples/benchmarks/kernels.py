"""Measures the native kernels, layer by layer, against the best dense float32. Run: make bench."""

from __future__ import annotations

import contextlib
import copy
import ctypes
from statistics import median

import torch
from machine import console, interleaved, ratios, say_machine
from rich.table import Table
from torch import Tensor, nn

from lightning_muws import MicroStructure
from lightning_muws.runtime.kernels import native, signs
from lightning_muws.runtime.native.library import level

SHARES = (0.75, 0.9)
CONV_BOUNDS = {(1, 0.75): 3.6, (1, 0.9): 7.5, (32, 0.75): 2.6, (32, 0.9): 5.0}
LINEAR_BOUNDS = {(1, 0.75): 3.8, (1, 0.9): 9.5, (32, 0.75): 3.5, (32, 0.9): 8.0}
LARGE = torch.zeros(1 << 24)  # 64 MB: reading it leaves no weights in the caches


def pruned(layer: nn.Module, block_shape: tuple[int, int], prune: float, unify: float = 0.0) -> nn.Module:
    """Return a copy of the layer inside a structure."""
    layer = copy.deepcopy(layer)
    structure = MicroStructure(block_shape, prune, unify)
    layer.weight.data = structure.project(layer.weight.data).contiguous()
    return layer.eval()


def error(fast: nn.Module, layer: nn.Module, x: Tensor) -> float:
    want = copy.deepcopy(layer).double()(x.double())
    return float((fast(x) - want).abs().max() / want.abs().max())


def table(title: str) -> Table:
    made = Table(title=title)
    for header in ("", "batch", "ms", "times faster", "least", "largest", "bound", "", "GFLOP/s", "error"):
        made.add_column(header, justify="right" if header else "left")
    return made


def measure(
    where: Table,
    name: str,
    batch: int,
    dense: dict[str, object],
    fast: dict[str, tuple[object, float | None, float, float]],
    operations: float,
    cold: bool = False,
) -> None:
    """Add a row for each way, the dense ones first; ``fast`` holds task, bound, share of operations, error."""
    tasks = dense | {key: value[0] for key, value in fast.items()}
    times = interleaved(tasks, rounds=25 if batch == 1 else 11, before=LARGE.sum if cold else lambda: None)
    exact = [key for key in dense if "float32" in key]
    best = min(exact, key=lambda key: median(times[key]))
    for key in tasks:
        relative = ratios({"best": times[best], key: times[key]}, key)["best"]
        ms = 1e3 * median(times[key])
        bound, share, wrong = (None, 1.0, None) if key in dense else fast[key][1:]
        met = "" if bound is None else "met" if relative[0] >= bound else "MISSED"
        where.add_row(
            f"{name} {key}{' (best)' if key == best else ''}",
            str(batch),
            f"{ms:.3f}",
            *(f"{value:.2f}" for value in relative),
            "" if bound is None else f"{bound:g}",
            met,
            f"{share * operations / ms / 1e6:.0f}",
            "" if wrong is None else f"{wrong:.0e}",
        )
    where.add_section()


def convolutions() -> None:
    found = table("3x3 convolutions, weights at hand; times faster than the best dense float32")
    for channels, size in ((64, 56), (128, 28), (256, 14), (512, 7)):
        layer = nn.Conv2d(channels, channels, 3, padding=1).eval()
        for batch in (1, 32):
            x = torch.randn(batch, channels, size, size)
            last = x.to(memory_format=torch.channels_last)
            nhwc = copy.deepcopy(layer).to(memory_format=torch.channels_last)
            half, x16 = copy.deepcopy(nhwc).bfloat16(), last.bfloat16()
            dense = {
                "dense float32 NCHW": lambda m=layer, x=x: m(x),
                "dense float32 NHWC": lambda m=nhwc, x=last: m(x),
                "dense bfloat16 NHWC": lambda m=half, x=x16: m(x),
            }
            fast = {}
            for share in SHARES:
                for shape in ((4, 4), (4, 1)):
                    sparse = pruned(layer, shape, share)
                    ways = {"float32": native.build}
                    if batch > 1 and shape == (4, 4):
                        ways["bfloat16"] = native.build_bfloat16
                    for way, build in ways.items():
                        made = build(sparse, shape, x)
                        if made is not None:
                            bound = CONV_BOUNDS[batch, share] if way == "float32" else None
                            name = f"{shape[0]}x{shape[1]} {share:.0%} pruned, native {way}"
                            fast[name] = (lambda m=made, x=x: m(x), bound, 1 - share, error(made, sparse, x))
            name = f"{channels} channels, {size}x{size}:"
            measure(found, name, batch, dense, fast, 2 * batch * 9 * channels**2 * size**2)
    console.print(found)


def linears(size: int = 4096) -> None:
    found = table(f"Linear {size}x{size}, weights out of the caches; times faster than the best dense float32")
    layer = nn.Linear(size, size).eval()
    for batch in (1, 32):
        x = torch.randn(batch, size)
        dense = dense_linears(layer, x)
        fast = {}
        for share in SHARES:
            for shape in ((4, 4), (8, 8), (4, 1)):
                sparse = pruned(layer, shape, share)
                for way, build in {"float32": native.build, "bfloat16": native.build_bfloat16}.items():
                    made = build(sparse, shape, x) if batch > 1 or way == "float32" else None
                    if made is not None:
                        bound = LINEAR_BOUNDS[batch, share] if way == "float32" else None
                        name = f"{shape[0]}x{shape[1]} {share:.0%} pruned, native {way}"
                        fast[name] = (lambda m=made, x=x: m(x), bound, 1 - share, error(made, sparse, x))
        for shape in ((4, 4), (8, 8), (16, 16)) if batch == 1 else ():
            for share in (0.0, 0.5):
                unified = pruned(layer, shape, share, 1 - share)
                made = signs.build(unified, shape, x)
                name = f"{shape[0]}x{shape[1]} {share:.0%} pruned, else unified, signs"
                fast[name] = (lambda m=made, x=x: m(x), None, 1 - share, error(made, unified, x))
        measure(found, "", batch, dense, fast, 2 * batch * size**2, cold=True)
    console.print(found)


def dense_linears(layer: nn.Linear, x: Tensor) -> dict[str, object]:
    """Return the ways torch computes the dense layer, weights prepacked by oneDNN among them."""
    dense: dict[str, object] = {"dense float32 F.linear": lambda: layer(x)}
    if torch.backends.mkldnn.is_available():
        for name, kind in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
            packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight.to(kind), len(x))
            bias, given = layer.bias.to(kind), x.to(kind)
            dense[f"dense {name} oneDNN"] = lambda w=packed, b=bias, x=given: torch.ops.mkldnn._linear_pointwise(
                x, w, b, "none", [], ""
            )
    if int8 := dynamic_int8(layer):
        dense["dense int8 dynamic"] = lambda: int8(x)
    return dense


def dynamic_int8(layer: nn.Module) -> nn.Module | None:
    """Return torch's dynamically quantized layer, where this build of torch has it."""
    engines = [
        engine for engine in ("x86", "fbgemm", "qnnpack") if engine in torch.backends.quantized.supported_engines
    ]
    if not engines:
        return None
    torch.backends.quantized.engine = engines[0]
    whole = nn.Sequential(copy.deepcopy(layer))
    return torch.ao.quantization.quantize_dynamic(whole, {nn.Linear}, dtype=torch.qint8)


def keep_memory() -> None:
    """Let glibc keep what is freed: or a task pays for the pages that another one gave back."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD, its largest
        mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD


def main() -> None:
    say_machine()
    keep_memory()
    console.print(f"native kernels: {level() or 'not built: nothing to measure'}")
    if level() is not None:
        torch.manual_seed(0)
        with torch.inference_mode():
            convolutions()
            linears()


if __name__ == "__main__":
    main()
