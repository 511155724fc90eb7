"""Measures the memory that writing a file takes beyond what is there before, each in a process that does nothing else.

Run: python -m tests.support.peak_memory 384
"""

import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from lightning_muws import open_compressed, save_compressed, verify_compressed
from lightning_muws.artifact import save, writer
from lightning_muws.artifact.compress import compress_file

MB = 1 << 20
SHARDS = 3
TENSORS = 24  # of a checkpoint
SETTINGS = {"lossless": {}, "lossy": {"max_error": 0.01}, "compression": {"compression": 8}}


def peak() -> int:
    """Return the most bytes that were resident at once in this process until now."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def seeded(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def write_sharded(folder: Path, n_mb: int) -> Path:
    """Write a checkpoint of so many megabytes in several files, and return its index."""
    weight_map: dict[str, str] = {}
    for shard in range(SHARDS):
        names = [f"layers.{i}.weight" for i in range(TENSORS) if i % SHARDS == shard]
        file = f"model-{shard + 1:05}-of-{SHARDS:05}.safetensors"
        save_file({name: seeded(i, n_mb * MB // TENSORS // 4096, 1024) for i, name in enumerate(names)}, folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": n_mb * MB}, "weight_map": weight_map}))
    return index


def measure(what: str, n_mb: int, chunk_mb: int, folder: Path) -> float:
    """Return the megabytes that a file takes beyond its source, if that is in memory."""
    torch.set_num_threads(1)
    save.CHUNK_BYTES = writer.CHUNK_BYTES = chunk_mb * MB
    path, small = folder / "model.muws", {"w": seeded(0, 256, 256), "b": seeded(1, 256)}
    compress_file(small, path, 8)  # what is imported and cached at first use is not counted
    save_compressed(small, path, max_error=0.01)
    verify_compressed(path)
    source = (
        folder / "model.safetensors.index.json" if what in ("compress", "pack") else {"w": seeded(0, 1024, n_mb * 256)}
    )
    if what == "partial":
        return partial(n_mb, folder)
    before = peak()
    if what == "compress":
        compress_file(source, path, 8)
    else:
        save_compressed(source, path, **SETTINGS.get(what, {"compression": 8}))
    return (peak() - before) / MB


def partial(n_mb: int, folder: Path) -> float:
    """Return the megabytes that reading one large tensor of a file takes, beyond the tensor itself."""
    path = folder / "large.muws"
    command = f"from tests.support import peak_memory as p; p.write_large(p.Path({str(path)!r}), {n_mb})"
    subprocess.run([sys.executable, "-c", command], check=True, cwd=Path(__file__).parents[2])  # noqa: S603
    with open_compressed(path) as file:
        file.get_tensor("small")  # what is imported and cached at first use is not counted
        before = peak()
        tensor = file.get_tensor("2")
    return (peak() - before - tensor.nbytes) / MB


def write_large(path: Path, n_mb: int) -> None:
    """Write a file of four large tensors that nothing makes smaller, and a small one."""
    torch.set_num_threads(1)
    save.CHUNK_BYTES = writer.CHUNK_BYTES = 4 * MB
    state = {str(i): seeded(i, n_mb * MB // 4 // 4096, 1024) for i in range(4)}
    save_compressed({"small": seeded(9, 1000, 1000), **state}, path, blocks=(16, 16))


def run(what: str, n_mb: int, chunk_mb: int, folder: Path) -> float:
    """Return what :func:`measure` returns, in a process of its own."""
    command = [sys.executable, "-m", "tests.support.peak_memory", what, str(n_mb), str(chunk_mb), str(folder)]
    done = subprocess.run(  # noqa: S603  our own code
        command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]
    )
    return float(done.stdout)


if __name__ == "__main__":
    if len(sys.argv) > 2:
        sys.stdout.write(f"{measure(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))}\n")
    else:
        n_mb = int(sys.argv[1])
        with tempfile.TemporaryDirectory() as name:
            write_sharded(Path(name), n_mb)
            for what, most in (("compress", 256), ("pack", 256), *dict.fromkeys(SETTINGS, 192).items()):
                found = run(what, n_mb, 32, Path(name))
                sys.stdout.write(f"{what:12} {n_mb} MB: {found:.0f} MB beyond it, at most {most} are allowed\n")
                if found > most:
                    sys.exit(1)
