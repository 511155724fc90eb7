"""How benchmarks measure: process time, interleaved, medians with spread, one thread, and the machine said."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median

import torch
from rich.console import Console

console = Console(width=180)


def say_machine(threads: int = 1) -> None:
    """Print what the numbers were measured on, and fix the number of threads."""
    torch.set_num_threads(threads)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    capability = torch.backends.cpu.get_cpu_capability()
    console.print(
        f"{name}, {capability}, {platform.system()}, Python {platform.python_version()}, torch {torch.__version__}"
    )
    console.print(
        "one thread, process time, interleaved" if threads == 1 else f"{threads} threads, wall time, interleaved"
    )


def interleaved(
    tasks: Mapping[str, Callable[[], object]],
    rounds: int = 15,
    sample_s: float = 0.0,
    before: Callable[[], object] = lambda: None,
) -> dict[str, list[float]]:
    """Return the process times in seconds of each task, run in turn for so many rounds after one to warm up.

    With more threads than one they are those of the wall. A sample takes at least ``sample_s``: shorter tasks are run
    several times in a row, as they are in use. What stands ``before`` every sample is not timed.
    """
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter  # threads wait for each other
    repeats = dict.fromkeys(tasks, 1)
    times: dict[str, list[float]] = {name: [] for name in tasks}
    for turn in range(rounds + 1):
        for name, task in tasks.items():
            before()
            start = clock()
            for _ in range(repeats[name]):
                task()
            seconds = clock() - start
            if turn:
                times[name].append(seconds / repeats[name])
            else:
                repeats[name] = max(1, round(sample_s / seconds))
    return times


def ratios(times: Mapping[str, list[float]], base: str) -> dict[str, tuple[float, float, float]]:
    """Return the median, least and largest ratio of each task to the base, taken round by round."""
    by_round = {n: [a / b for a, b in zip(ts, times[base], strict=True)] for n, ts in times.items()}
    return {name: (median(values), min(values), max(values)) for name, values in by_round.items()}
