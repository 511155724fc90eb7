"""The dense network, trained as long as all: as it is, in our lossy file, and in NNC (ISO/IEC 15938-17)."""

from __future__ import annotations

import lzma
import tempfile
from io import BytesIO
from pathlib import Path

import torch

from contestants.arena import Arena, State, Stored
from contestants.environments import stand_in
from contestants.sized import muws


def dense(arena: Arena, _setting: str) -> dict:
    """Return the row of the network without any loss."""
    state = arena.longer().state_dict()
    return arena.judged([muws(state), zipped(state)])


def lossy(arena: Arena, setting: str) -> dict:
    """Return the row of our file without any structure, each weight within a share of the largest of its tensor."""
    state = arena.longer().state_dict()
    return arena.judged([muws(state, "muws, lossy", max_error=float(setting), lossy="all")])


def nnc(arena: Arena, setting: str) -> dict:
    """Return the row of a file of NNCodec, whose quantisation parameter is the setting."""
    stand_in("torchvision", "torchvision.datasets", "torchvision.transforms", "cv2", "ptflops")
    import nncodec.nnc

    state = arena.longer().state_dict()
    arrays = {name: x.float().numpy() for name, x in state.items() if x.ndim}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.nnc"
        nncodec.nnc.compress(arrays, bitstream_path=str(path), qp=int(setting), verbose=False)
        n_bytes = path.stat().st_size
        found = nncodec.nnc.decompress(str(path), verbose=False)
    return arena.judged([Stored(n_bytes, f"NNC, qp {setting}", {n: torch.as_tensor(x) for n, x in found.items()})])


def zipped(state: State) -> Stored:
    """Return the file of `torch.save` through lzma."""
    buffer = BytesIO()
    torch.save(dict(state), buffer)
    data = lzma.compress(buffer.getvalue(), preset=9 | lzma.PRESET_EXTREME)
    return Stored(len(data), "torch.save, lzma", torch.load(BytesIO(lzma.decompress(data))))


SETTINGS = {
    dense: ("",),
    lossy: ("0.01", "0.02", "0.03", "0.04", "0.06", "0.08", "0.1", "0.15", "0.2"),
    nnc: ("-38", "-32", "-26", "-23", "-20", "-17", "-14", "-11"),
}
