"""Compares everyone who makes networks small: the same network, data, epochs, optimizer and seeds for all.

All start from the same dense network of 5 epochs and train for 10 more. A row of the table is the accuracy of the
smallest real file, loaded afresh, on the test set, by which nothing is chosen but what `rounded` says. Each tool is
installed into a folder of its own when it is needed, each run is a process of its own, and its row is kept in
output/peers/results.jsonl: run the command again to go on, or with `--again` to repeat what failed. Times are of one
image and one thread: ours through `accelerate`, the others in plain PyTorch. Run: make bench-peers.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import mean

from contestants import arena, dense, environments, ours, pictures, pruners, quantised, sparse
from fitting import spread
from machine import console, say_machine
from rich.table import Table

FAMILIES = (dense, quantised, sparse, pruners, ours)
CONTESTANTS: dict[str, tuple[Callable, tuple[str, ...]]] = {
    run.__name__: (run, settings) for family in FAMILIES for run, settings in family.SETTINGS.items()
}
FOLDER = Path("output/peers")
SECONDS = 3600  # that a run may take
KEYS = ("contestant", "setting", "network", "seed")


def jobs(contestants: Iterable[str], networks: Iterable[str], seeds: Iterable[int]) -> list[tuple]:
    """Return the keys of all runs; a contestant without a setting has all of its settings.

    Raises:
        SystemExit: There is no contestant of that name.
    """
    chosen = []
    for word in contestants:
        name, slash, setting = word.partition("/")
        if name not in CONTESTANTS:
            sys.exit(f"there is no contestant {name!r}; there are {', '.join(CONTESTANTS)}")
        chosen += [(name, one) for one in ((setting,) if slash else CONTESTANTS[name][1])]
    return [(*one, network, seed) for seed in seeds for network in networks for one in chosen]


def kept(path: Path) -> dict[tuple, dict]:
    """Return the rows of a results file by their keys; a later row replaces an earlier one, and half a line is none."""
    rows = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:  # the bench was killed while it wrote
            continue
        rows[tuple(row[key] for key in KEYS)] = row
    return rows


def keep(path: Path, row: dict) -> None:
    """Append a row to a results file."""
    is_cut = path.exists() and not path.read_bytes().endswith(b"\n")
    with path.open("a") as file:
        file.write("\n" * is_cut + json.dumps(row) + "\n")


def run(key: tuple, program: tuple[str, ...] = (__file__,)) -> dict:
    """Run a contestant in a process of its own and return its row, or the reason why there is none.

    Args:
        key: The values of `KEYS`.
        program: What Python runs: this file.
    """
    name, setting, network, seed = key
    row = dict(zip(KEYS, key, strict=True))
    try:
        place = environments.ready(name, FOLDER / "environments")
    except environments.MissingError as error:
        return {**row, "failed": str(error)}
    paths = [str(place.absolute())] if place else []
    paths += [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    words = ["--worker", f"{name}/{setting}", "--networks", network, "--seeds", str(seed)]
    command = [sys.executable, *program, *words]
    try:
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=SECONDS)  # noqa: S603  our own
    except subprocess.TimeoutExpired:
        return {**row, "failed": f"it took more than {SECONDS} seconds"}
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        return {**row, "failed": (done.stderr.strip().splitlines() or ["no output"])[-1][:300]}
    return {**row, **json.loads(lines[-1])}


def work(word: str, network: str, seed: int) -> None:
    """Print the row of one run as a line of JSON."""
    arena.prepare()
    started = time.process_time()
    name, _, setting = word.partition("/")
    out, sys.stdout = sys.stdout, sys.stderr  # tools print
    row = CONTESTANTS[name][0](arena.Arena(network, seed, FOLDER), setting)
    sys.stdout = out
    print(json.dumps({**row, "cpu_s": round(time.process_time() - started)}))


def table_of(rows: Iterable[dict], network: str) -> Table:
    """Return the table of one network: a row for each contestant and setting, over its seeds."""
    table = Table(title=f"{network}: test accuracy, mean +- standard deviation (each seed)")
    for header in ("contestant", "setting", "bytes", "ratio", "accuracy", "batch 1, ms", "speedup", "made small by"):
        table.add_column(header)
    groups: dict[tuple, list[dict]] = {}
    for row in sorted(rows, key=lambda row: row["seed"]):
        if row["network"] == network:
            groups.setdefault((row["contestant"], row["setting"]), []).append(row)
    for (name, setting), runs in groups.items():
        good = [run for run in runs if "failed" not in run]
        if good:
            n_bytes, ratio, ms, speedup = (
                mean(row[key] for row in good) for key in ("n_bytes", "ratio", "ms", "speedup")
            )
            accuracy = spread([row["accuracy"] for row in good])
            how = ", ".join(dict.fromkeys(row["how"] for row in good))
            table.add_row(
                name, setting, f"{n_bytes:,.0f}", f"{ratio:.1f}x", accuracy, f"{ms:.3f}", f"{speedup:.2f}", how
            )
        else:
            table.add_row(name, setting, "", "", "did not run", "", "", runs[-1]["failed"])
    return table


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--contestants", nargs="+", default=list(CONTESTANTS), help="names, or name/setting")
    options.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options.add_argument("--networks", nargs="+", choices=arena.NETWORKS, default=["demo"])
    options.add_argument("--again", action="store_true", help="repeat runs that failed")
    options.add_argument("--table", action="store_true", help="run nothing, show and draw what is there")
    options.add_argument("--worker", help=argparse.SUPPRESS)
    chosen = options.parse_args()
    if chosen.worker:
        work(chosen.worker, chosen.networks[0], chosen.seeds[0])
        return
    say_machine()
    path = FOLDER / "results.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    for key in [] if chosen.table else jobs(chosen.contestants, chosen.networks, chosen.seeds):
        row = kept(path).get(key)
        if row is None or ("failed" in row and chosen.again):
            row = run(key)
            keep(path, row)
            console.print(row)
    rows = list(kept(path).values())
    for network in chosen.networks:
        console.print(table_of(rows, network))
        own = [row for row in rows if row["network"] == network]
        for key in pictures.AXES:
            pictures.draw(own, key, FOLDER / f"{network}-{key}.png")


if __name__ == "__main__":
    main()
