"""Times ways to do one thing against each other: in turn, in one process, as short as it can be."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import torch

MOST_REPEATS = 100  # of a task in one sample
COARSE_S = 1e-4  # a clock of coarser steps cannot time a layer


@dataclass(frozen=True)
class Timing:
    """How long a race may take.

    Args:
        rounds: Rounds after one to warm up, at most.
        least_rounds: Rounds that are run whatever they cost.
        budget_s: Seconds after which no further round begins.
        hopeless: After two rounds a task that took more than this times the best is not run again, nor after one round
            a task that took more than its square.
        sample_s: Seconds that a sample takes at least: short tasks are run several times in a row, as they are in use.
    """

    rounds: int = 9
    least_rounds: int = 3
    budget_s: float = 1.0
    hopeless: float = 1.6
    sample_s: float = 0.0


def clock_for(device: torch.device) -> Callable[[], float]:
    """Return the clock for work on a device, in seconds.

    One thread of a CPU is timed by the process's own time, which other processes do not touch; more threads, and
    devices (which are waited for), by the wall's, because time spent waiting for each other counts.
    """
    if device.type == "cuda":

        def waited() -> float:
            torch.cuda.synchronize(device)
            return time.perf_counter()

        return waited
    coarse = time.get_clock_info("process_time").resolution > COARSE_S
    return time.perf_counter if coarse or torch.get_num_threads() > 1 else time.process_time


def race(
    tasks: Mapping[str, Callable[[], object]],
    clock: Callable[[], float],
    timing: Timing | None = None,
    keep: Sequence[str] = (),
    between: Callable[[], object] | None = None,
) -> dict[str, list[float]]:
    """Return the seconds of each task, round by round; lists of tasks that were given up are shorter.

    Args:
        tasks: What to time, by name; run in turn.
        clock: Gives seconds.
        timing: How long it may take.
        keep: Tasks that are never given up.
        between: Run before each task and not timed: it leaves the caches as they are found in use.
    """
    timing = timing or Timing()
    times: dict[str, list[float]] = {name: [] for name in tasks}
    repeats = dict.fromkeys(tasks, 1)
    running, start = list(tasks), time.perf_counter()
    for turn in range(timing.rounds + 1):
        if turn > timing.least_rounds and time.perf_counter() - start > timing.budget_s:
            break
        for name in running:
            if between is not None:
                between()
            begin = clock()
            for _ in range(repeats[name]):
                tasks[name]()
            seconds = clock() - begin
            if turn:
                times[name].append(seconds / repeats[name])
            else:
                repeats[name] = max(1, min(MOST_REPEATS, round(timing.sample_s / max(seconds, 1e-9))))
        if turn in (1, 2):
            best = min(median(times[name]) for name in running)
            limit = timing.hopeless if turn == 2 else timing.hopeless**2
            running = [n for n in running if n in keep or median(times[n]) <= limit * best]
    return times


def gain(base: Sequence[float], other: Sequence[float]) -> float:
    """Return how many times faster ``other`` is, the median over the rounds that both ran."""
    ratios = [b / max(o, 1e-12) for b, o in zip(base, other, strict=False)]
    return median(ratios) if ratios else 0.0
