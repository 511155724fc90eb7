"""Whole networks, accelerated, against their best dense form. Run: make bench.

Blocks of 4x4 are pruned by size in random weights, which scatters them; batch norms get statistics at random. The best
dense form is the fastest of: as given, batch norm folded, channels last, and prepacked by oneDNN with its fused ReLUs.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from statistics import median

import torch
from cost import resnet18
from machine import console, interleaved, ratios, say_machine
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_muws import MicroStructure
from lightning_muws.runtime.accelerate import accelerate
from lightning_muws.runtime.measure.network import bf16_form, dense_forms
from lightning_muws.runtime.rewrite.graph import fold
from lightning_muws.runtime.rewrite.observe import Example, inference

SHARES = (0.0, 0.5, 0.75, 0.9)
BOUNDS = {
    ("ResNet-18", 0.75, 1): 3.3,
    ("ResNet-18", 0.75, 32): 2.6,
    ("ResNet-18", 0.9, 1): 5.5,
    ("ResNet-18", 0.9, 32): 4.5,
}
NOISE = 0.97  # of the model as given: what came back may not be slower than that


class Inverted(nn.Module):
    """Expand, a depthwise convolution, project (Sandler et al. 2018)."""

    def __init__(self, n_in: int, n_out: int, stride: int) -> None:
        super().__init__()
        wide = 6 * n_in
        self.shortcut = stride == 1 and n_in == n_out
        self.steps = nn.Sequential(
            *(nn.Conv2d(n_in, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.ReLU6()),
            *(nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False), nn.BatchNorm2d(wide), nn.ReLU6()),
            *(nn.Conv2d(wide, n_out, 1, bias=False), nn.BatchNorm2d(n_out)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.steps(x) if self.shortcut else self.steps(x)


def mobilenet() -> nn.Module:
    widths = [(32, 32, 1), (32, 64, 2), (64, 64, 1), (64, 96, 2), (96, 96, 1), (96, 96, 1)]
    first = [nn.Conv2d(3, 32, 3, 1, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU6()]
    blocks = [Inverted(*width) for width in widths]
    return nn.Sequential(*first, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(96, 10))


class Attention(nn.Module):
    """A transformer's layer: attention and a wide MLP, each beside a shortcut."""

    def __init__(self, width: int = 256, heads: int = 8) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(x)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(784, 2048), nn.ReLU(), nn.Linear(2048, 2048), nn.ReLU(), nn.Linear(2048, 10))


def transformer() -> nn.Module:
    return nn.Sequential(*(Attention() for _ in range(4)), nn.LayerNorm(256))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "ResNet-18": (lambda: resnet18("CIFAR"), (3, 32, 32)),
    "MLP": (mlp, (784,)),
    "MobileNetV2-like": (mobilenet, (3, 32, 32)),
    "transformer": (transformer, (64, 256)),
}


def pruned(name: str, share: float) -> nn.Module:
    """Return the network in eval mode with this share of its blocks pruned: of ResNet-18 its 3x3 convolutions alone."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = NETWORKS[name][0]().eval().requires_grad_(False)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
        weight = getattr(module, "weight", None)
        if not isinstance(module, (nn.Linear, nn.Conv2d)) or weight.shape[1] <= 3 or len(weight) == 10:
            continue  # the first and the last layer, and depthwise ones, stay dense
        if share and (name != "ResNet-18" or weight.shape[2:] == (3, 3)):
            weight.copy_(MicroStructure((4, 4), prune_ratio=share).project(weight))
    return model


def measure(name: str, share: float, batch: int, rounds: int) -> tuple[str, ...]:
    """Return a row of the table."""
    model, x = pruned(name, share), torch.randn(batch, *NETWORKS[name][1])
    fast, report = accelerate(model, x)
    with inference():
        folded = copy.deepcopy(model)
        fold(folded, Example.of(x))
        forms = dense_forms(model, folded, Example.of(x))
        tasks = {form: lambda m=m, e=e: e(m) for form, (m, e) in (forms | bf16_form(folded, Example.of(x))).items()}
        times = interleaved(tasks | {"accelerated": lambda: fast(x)}, rounds, sample_s=0.02)
    best = min(forms, key=lambda form: median(times[form]))
    to = {base: ratios(times, "accelerated")[base] for base in (best, "dense", "bf16")}
    gain, least, most = to[best]
    bound = BOUNDS.get((name, share, batch))
    met = f"{bound} {'met' if gain >= bound else 'MISSED'}" if bound else ""
    if not bound and not report.is_faster:
        met = "as it was"  # a copy of the model as given: what differs from 1 is noise
    elif not bound:
        met = "not slower" if to["dense"][0] >= NOISE else "SLOWER"
    ms = {form: 1e3 * median(times[form]) for form in times}
    return (
        name,
        str(batch),
        f"{share:.0%}",
        f"{ms['dense']:.2f}",
        f"{ms[best]:.2f} {best}",
        f"{ms['accelerated']:.2f} {report.chosen}",
        f"{gain:.2f}",
        f"{least:.2f} to {most:.2f}",
        f"{to['dense'][0]:.2f}",
        f"{to['bf16'][0]:.2f}",
        f"{report.errors[report.chosen]:.0e}",
        met,
    )


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    options.add_argument("--shares", nargs="+", type=float, default=list(SHARES), help="of blocks pruned")
    options.add_argument("--batches", nargs="+", type=int, default=[1, 32])
    options.add_argument("--threads", type=int, default=1)
    chosen = options.parse_args()
    say_machine(chosen.threads)
    table = Table(title=f"accelerate on whole networks, 4x4 blocks scattered, {chosen.threads} thread(s)")
    headers = ("network", "batch", "pruned", "as given, ms", "best dense, ms", "accelerated, ms", "gain", "spread")
    for header in (*headers, "over as given", "over bf16", "error", "bound"):
        table.add_column(header, justify="right" if header != "network" else "left")
    for name in chosen.networks:
        for batch in chosen.batches:
            for share in chosen.shares:
                table.add_row(*measure(name, share, batch, 31 if batch == 1 else 9))
    console.print(table)


if __name__ == "__main__":
    main()
