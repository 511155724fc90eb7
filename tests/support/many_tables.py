"""The file whose streams take most time for their bytes: as many tables as a stream may have, each for one step.

Run: python -m tests.support.many_tables 10
"""

import sys
import tempfile
import time
import zlib
from pathlib import Path

import numpy as np

from lightning_muws import load_compressed
from lightning_muws.artifact import rans
from lightning_muws.artifact.varint import number
from tests.support.coder import coder, levels
from tests.support.forge import put_together

TABLE = bytes([7, 7]) + number(rans.TOTAL)  # of one symbol, which changes no state
PLANES = 8
MB = 1_000_000


def stream(n: int) -> bytes:
    """Return a stream of ``n`` equal symbols."""
    lanes = rans.n_lanes(n)
    n_tables = min(rans.MAX_TABLES, -(-n // lanes))
    states = np.full(lanes, rans.LOW, "<u4").tobytes()
    return number(n_tables) + number(1) * (n_tables - 1) + TABLE * n_tables + states


def write(path: Path, n: int, n_bytes: int) -> float:
    """Write a file of about ``n_bytes``, of streams of ``n``; return the megabytes of it and its tensor."""
    coded = stream(n)
    n_chunks = max(1, n_bytes // (PLANES * len(coded)))
    names = [f"free.float64.{i}" for i in range(PLANES)]
    ends = [[0, (i + 1) * n] for i in range(n_chunks - 1)] + [[1, 0]]
    about = {name: ["rans", zlib.crc32(coded)] for name in names}
    tensor = {"name": "w", "dtype": "float64", "shape": [n_chunks * n]}
    manifest = {"version": "1.0", "tensors": [tensor], "chunks": [{"until": end, "streams": about} for end in ends]}
    path.write_bytes(put_together(manifest, {f"c{i}.{name}": coded for i in range(n_chunks) for name in names}))
    return (path.stat().st_size + 8 * n_chunks * n) / MB


def seconds_a_megabyte(path: Path, n: int, n_bytes: int) -> float:
    """Return the seconds that such a file takes for each megabyte of it and its tensor."""
    n_mb = write(path, n, n_bytes)
    start = time.process_time()
    load_compressed(path)
    return (time.process_time() - start) / n_mb


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        for level in ("none", *levels()):
            for n in (1024, 4095, 40_000, 300_000):
                with coder(level):
                    found = seconds_a_megabyte(Path(folder) / "m.muws", n, int(sys.argv[1]) * MB)
                sys.stdout.write(f"{level}: streams of {n}: {found:.3f} s for each MB of file and tensors\n")
