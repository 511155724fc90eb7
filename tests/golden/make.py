"""Makes the golden files of this version; run once when a version is released, never to make a test pass."""

from pathlib import Path

import torch

from lightning_muws import load_compressed, save_compressed
from tests.support.forge import small_model
from tests.support.strategies import normal

HERE = Path(__file__).parent

if __name__ == "__main__":
    state = small_model(HERE / "1.0-exact.muws")
    torch.save(state, HERE / "1.0-exact.pt")
    lossy = {k: x for k, x in state.items() if x.is_floating_point()} | {"half": normal(9, 9, 70).half()}
    save_compressed(lossy, HERE / "1.0-lossy.muws", max_error=0.01, extra={"made": "by tests/golden/make.py"})
    torch.save(dict(load_compressed(HERE / "1.0-lossy.muws")), HERE / "1.0-lossy.pt")
