"""Makes the golden files of this version; run once when a version is released, never to make a test pass."""

from pathlib import Path

import torch

from lightning_muws import MicroStructure, load_compressed, save_compressed
from tests.support.forge import small_model
from tests.support.strategies import normal

HERE = Path(__file__).parent


def newer() -> dict[str, torch.Tensor]:
    """Return a state_dict that uses all that format 1.1 adds: copies, filters, a palette, and bytes in blocks."""
    few = normal(0, 9, dtype=torch.float32)[torch.randint(0, 9, (80, 90), generator=torch.Generator().manual_seed(0))]
    bytes_ = MicroStructure((4, 4), 0.6, 0.3).project(normal(1, 64, 64)).mul(30).round().clamp(-127, 127).to(torch.int8)
    uint8, ids = bytes_.int().add(128).to(torch.uint8), torch.arange(0, 9000, 3, dtype=torch.int32)
    return {"few": few, "again": few.clone(), "q": bytes_, "u": uint8, "ids": ids}


def masks() -> dict[str, torch.Tensor]:
    """Return a state_dict whose file has each filter of format 1.1, in parts."""
    ones, generator = torch.ones(96, 96, dtype=torch.bool), torch.Generator().manual_seed(0)
    blocks = (torch.rand(24, 24, generator=generator) > 0.5).repeat_interleave(4, 0).repeat_interleave(4, 1)
    ids = torch.arange(60)[:, None] - torch.arange(60) + 59
    return {"n": torch.tensor(3), "causal": ones.tril(), "blocks": blocks, "ids": ids, "m": torch.tensor(4)}


def make_1_0() -> None:
    """Make the files of format 1.0."""
    state = small_model(HERE / "1.0-exact.muws")
    torch.save(state, HERE / "1.0-exact.pt")
    lossy = {k: x for k, x in state.items() if x.is_floating_point()} | {"half": normal(9, 9, 70).half()}
    save_compressed(lossy, HERE / "1.0-lossy.muws", max_error=0.01, extra={"made": "by tests/golden/make.py"})
    torch.save(dict(load_compressed(HERE / "1.0-lossy.muws")), HERE / "1.0-lossy.pt")


if __name__ == "__main__":
    make_1_0()
    torch.save(newer(), HERE / "1.1-exact.pt")
    save_compressed(newer(), HERE / "1.1-exact.muws")
    torch.save(masks(), HERE / "1.1-masks.pt")
    save_compressed(masks(), HERE / "1.1-masks.muws")
