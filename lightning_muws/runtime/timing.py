"""Times several ways to do one thing: in turn, in one process, and only as long as needed."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import torch

MOST_REPEATS = 100  # runs of a task in one sample
COARSE_S = 1e-4  # a clock with larger steps cannot time a layer


@dataclass(frozen=True)
class Timing:
    """How long a race may take.

    Args:
        rounds: The most rounds, after one to warm up.
        least_rounds: Rounds that always run.
        budget_s: Seconds after which no further round begins.
        hopeless: A task that takes more than this times the best stops after two rounds; one that takes more than the
            square of this times the best stops after one.
        sample_s: The least seconds of a sample: a shorter task runs several times in a row, as it does in use.
    """

    rounds: int = 9
    least_rounds: int = 3
    budget_s: float = 1.0
    hopeless: float = 1.6
    sample_s: float = 0.0


def clock_for(device: torch.device) -> Callable[[], float]:
    """Return the clock for work on a device, in seconds.

    One thread of a CPU is timed in process time, which excludes other processes. Several threads, and devices, are
    timed in wall-clock time, because waiting counts there; the clock of a device synchronizes with it first.
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
    """Return the seconds of each task, round by round; the list of a task that was stopped early is shorter.

    Args:
        tasks: What to time, by name; they run in turn.
        clock: Returns seconds.
        timing: How long the race may take.
        keep: Tasks that always run to the end.
        between: Runs before each task and is not timed: it leaves the caches as they are in use.
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
    """Return how many times faster ``other`` is than ``base``: the median over the rounds that both ran."""
    ratios = [b / max(o, 1e-12) for b, o in zip(base, other, strict=False)]
    return median(ratios) if ratios else 0.0
