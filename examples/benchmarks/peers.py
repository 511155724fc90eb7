"""Whole networks, accelerated, against what people would pick instead: OpenVINO and ONNX Runtime. Run: make bench.

All of them run in turn in one process. The peers run the dense network, because zeros gain them nothing (export.py).
Their int8 is static, with one scale per output of a weight, calibrated on random inputs like those that are timed:
OpenVINO's by NNCF, ONNX Runtime's by its own tool. A peer that is not installed, or that fails on a network, is left
out, and the benchmark says so. With one thread, ours also runs in ONNX Runtime, by our operators (`export_onnx`).
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

import torch
from export import in_onnx_runtime
from machine import console, interleaved, ratios, say_machine
from rich.table import Table
from torch import Tensor, nn
from whole_networks import NETWORKS, pruned

from lightning_muws.errors import MuwsError
from lightning_muws.runtime.accelerate import accelerate
from lightning_muws.runtime.measure.network import dense_forms
from lightning_muws.runtime.rewrite.graph import fold
from lightning_muws.runtime.rewrite.observe import Example, inference

Run = Callable[[], object]
SHARES = (0.75, 0.9)
CALIBRATION = 64  # random inputs that set the ranges of int8; the times do not depend on their values
NEEDED = {"OpenVINO": ("openvino", "nncf"), "ONNX Runtime": ("onnx", "onnxscript", "onnxruntime")}
PEERS = ("OpenVINO fp32", "OpenVINO default", "OpenVINO int8", "ONNX Runtime fp32", "ONNX Runtime int8")
FP32 = ("torch fp32", "OpenVINO fp32", "ONNX Runtime fp32")
INT8 = ("OpenVINO int8", "ONNX Runtime int8")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hide what converters print and log."""
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


def openvino(model: nn.Module, x: Tensor, calibration: list[Tensor], threads: int) -> dict[str, Run]:
    """Return runs of the network in OpenVINO: float32, its default precision, and int8 by NNCF."""
    import nncf
    import openvino as ov

    def run(converted: object, **settings: object) -> Run:
        compiled = core.compile_model(converted, "CPU", {"PERFORMANCE_HINT": "LATENCY", **settings})
        request, given = compiled.create_infer_request(), x.numpy()
        return lambda: request.infer([given], share_inputs=True, share_outputs=True)

    core = ov.Core()
    core.set_property("CPU", {"INFERENCE_NUM_THREADS": threads})
    with quiet():
        converted = ov.convert_model(model, example_input=x, input=[tuple(x.shape)])
        kind = nncf.ModelType.TRANSFORMER if any(isinstance(m, nn.LayerNorm) for m in model.modules()) else None
        int8 = nncf.quantize(converted, nncf.Dataset([c.numpy() for c in calibration]), model_type=kind)
        return {
            "OpenVINO fp32": run(converted, INFERENCE_PRECISION_HINT="f32"),
            "OpenVINO default": run(converted),
            "OpenVINO int8": run(int8),
        }


def onnx_runtime(model: nn.Module, x: Tensor, calibration: list[Tensor], threads: int) -> dict[str, Run]:
    """Return runs of the network in ONNX Runtime: float32 and int8."""
    import onnxruntime
    from onnxruntime import quantization

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1

    class Batches(quantization.CalibrationDataReader):
        def __init__(self, name: str) -> None:
            self.left = iter([{name: c.numpy()} for c in calibration])

        def get_next(self) -> dict[str, object] | None:
            return next(self.left, None)

    def run(path: Path) -> Run:
        session = onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
        feed = {session.get_inputs()[0].name: x.numpy()}
        return lambda: session.run(None, feed)

    with quiet(), tempfile.TemporaryDirectory() as folder:
        given, prepared, int8 = (Path(folder) / f"{name}.onnx" for name in ("given", "prepared", "int8"))
        torch.onnx.export(model, (x,), given, dynamo=True, external_data=False, verbose=False)
        quantization.quant_pre_process(given, prepared)
        name = onnxruntime.InferenceSession(prepared.read_bytes(), options).get_inputs()[0].name
        quantization.quantize_static(prepared, int8, Batches(name), per_channel=True)
        return {"ONNX Runtime fp32": run(given), "ONNX Runtime int8": run(int8)}


def batches_like(x: Tensor) -> list[Tensor]:
    """Return random batches of the shape of ``x``."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(x.shape, generator=generator) for _ in range(max(1, CALIBRATION // len(x)))]


def peers_of(model: nn.Module, x: Tensor, threads: int) -> dict[str, Run]:
    """Return a run of each peer that is installed and takes the network; print which are missing, and why."""
    calibration = batches_like(x)
    found: dict[str, Run] = {}
    for peer, build in (("OpenVINO", openvino), ("ONNX Runtime", onnx_runtime)):
        if missing := [name for name in NEEDED[peer] if importlib.util.find_spec(name) is None]:
            console.print(
                f"{peer} is not measured: {', '.join(missing)} missing (pip install {' '.join(NEEDED[peer])})"
            )
            continue
        try:
            found |= build(model, x, calibration, threads)
        except Exception as error:  # a peer may raise anything on a network that it does not know
            console.print(f"{peer} is not measured: {type(error).__name__}: {str(error).splitlines()[0]}")
    return found


def in_onnx(name: str, fast: nn.Module, x: Tensor, threads: int) -> dict[str, Run]:
    """Return a run of our network in ONNX Runtime, or none: our operators there know one thread."""
    if threads > 1 or any(importlib.util.find_spec(needed) is None for needed in NEEDED["ONNX Runtime"]):
        return {}
    try:
        return {f"{name}, in ONNX Runtime": in_onnx_runtime(fast, x, custom_ops=True)}
    except MuwsError as error:
        console.print(f"{name} is not measured in ONNX Runtime: {error}")
        return {}


def best_of(times: dict[str, list[float]], names: tuple[str, ...]) -> str | None:
    """Return which of the names has the lowest median, or None if none was measured."""
    return min((n for n in names if n in times), key=lambda name: median(times[name]), default=None)


def over(times: dict[str, list[float]], base: str | None, ours: str) -> str:
    """Return how many times faster ours is than the base, with the smallest and the largest round."""
    if base is None:
        return "not measured"
    middle, least, most = ratios(times, ours)[base]
    return f"{middle:.2f} ({least:.2f} to {most:.2f})"


def measure(
    name: str, batch: int, shares: list[float], rounds: int, threads: int, kernels: list[str] | None
) -> tuple[list[str], list[list[str]]]:
    """Return the row of the dense forms' milliseconds, and a row for each share of ours."""
    dense, x = pruned(name, 0.0), torch.randn(batch, *NETWORKS[name][1])
    tasks = peers_of(dense, x, threads)
    ours: dict[str, Run] = {}
    with inference():
        folded = pruned(name, 0.0)
        fold(folded, Example.of(x))
        forms = dense_forms(dense, folded, Example.of(x))
        runs = {form: lambda m=m, e=e: e(m) for form, (m, e) in forms.items()}
        best = best_of(first := interleaved(runs, 5, sample_s=0.01), tuple(first)) or "dense"
        tasks["torch fp32"] = runs[best]
        for share in shares:
            model = pruned(name, share)
            exact = kernels and [kernel for kernel in kernels if kernel != "native_int8"]
            fast, _ = accelerate(model, x, kernels=exact)
            ours[f"ours fp32 {share:.0%}"] = lambda fast=fast: fast(x)
            ours |= in_onnx(f"ours fp32 {share:.0%}", fast, x, threads)
            fast, report = accelerate(model, x, dtype=torch.int8, calibration=batches_like(x), kernels=kernels)
            ours[f"ours int8 {share:.0%}"] = lambda fast=fast: fast(x)
            ours |= in_onnx(f"ours int8 {share:.0%}", fast, x, threads)
            console.print(f"{name}, batch {batch}, int8, {share:.0%} pruned ({report.chosen}): {report.summary()}")
        times = interleaved(tasks | ours, rounds, sample_s=0.02)
    cells = [f"{1e3 * median(times[n]):.3f}" if n in times else "-" for n in ("torch fp32", *PEERS)]
    fp32, int8 = best_of(times, FP32), best_of(times, INT8)
    rows = [
        [name, str(batch), mine, f"{1e3 * median(times[mine]):.3f}"]
        + [over(times, base, mine) for base in ("torch fp32", fp32, int8)]
        for mine in ours
    ]
    return [name, str(batch), *cells], rows


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    networks = [name for name in NETWORKS if name != "MobileNetV2-like"]
    options.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=networks)
    options.add_argument("--shares", nargs="+", type=float, default=list(SHARES), help="of blocks pruned")
    options.add_argument("--batches", nargs="+", type=int, default=[1, 32])
    options.add_argument("--rounds", type=int, default=0, help="0: 31 at batch 1, 9 at larger batches")
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--kernels", nargs="+", help="that accelerate may try; all by default, which takes longer")
    chosen = options.parse_args()
    say_machine(chosen.threads)
    dense = Table(title=f"The dense network, ms (median), {chosen.threads} thread(s)")
    for header in ("network", "batch", "torch fp32, best form", *PEERS):
        dense.add_column(header, justify="right" if header != "network" else "left")
    gains = Table(title="Ours, 4x4 blocks scattered: times faster (smallest and largest round)")
    for header in (
        "network",
        "batch",
        "",
        "ms",
        "over torch's best fp32",
        "over the best fp32 of all",
        "over the best int8",
    ):
        gains.add_column(header, justify="right" if header not in ("network", "") else "left")
    for name in chosen.networks:
        for batch in chosen.batches:
            rounds = chosen.rounds or (31 if batch == 1 else 9)
            row, ours = measure(name, batch, chosen.shares, rounds, chosen.threads, chosen.kernels)
            dense.add_row(*row)
            for cells in ours:
                gains.add_row(*cells)
    console.print(dense)
    console.print(gains)


if __name__ == "__main__":
    main()
