"""Compression without training on two pretrained networks, at ratios that were asked for.

FFDNet (Zhang, Zuo and Zhang 2018) removes noise from photographs; its score is the mean PSNR of 16 crops in dB. MiniLM
(Wang et al. 2020) finds the definition of a word among 1,000 of WordNet; its score is the share that comes first (R@1).
`compress, calibrated` sees 24 crops of other photographs, or 256 other definitions. `nearest, equal bytes` is
save_compressed(compression=) of the dense network: values rounded to the nearest, no structure. Each seed draws other
calibration data, other noise and other definitions. Run: make bench-compress.
"""

from __future__ import annotations

import argparse
import copy
import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev

import torch
from example_data import glosses
from machine import console, say_machine
from networks import FFDNet
from pretrained import MINILM_TOKENIZER, content, photograph, weights
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_muws import compress, load_compressed, save_compressed

SIGMA = 25 / 255
TESTED = ("astronaut.png", "coffee.png", "chelsea.png", "rocket.jpg")
CALIBRATED = ("motorcycle_left.png", "motorcycle_right.png", "ihc.png", "retina.jpg", "hubble_deep_field.jpg")
HOWS = ("compress, calibrated", "compress", "nearest, equal bytes")


def crops(names: tuple[str, ...], n: int, side: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return crops of photographs in turn, clean and noisy."""
    generator, found = torch.Generator().manual_seed(seed), []
    images = [photograph(name) for name in names]
    for i in range(n):
        image = images[i % len(images)]
        top, left = (int(torch.randint(size - side + 1, (1,), generator=generator)) for size in image.shape[1:])
        found.append(image[:, top : top + side, left : left + side])
    clean = torch.stack(found)
    return clean, clean + SIGMA * torch.randn(clean.shape, generator=generator)


def denoising(seed: int) -> tuple[nn.Module, list, Callable[[nn.Module], float]]:
    """Return FFDNet, its calibration batches, and its score."""
    model = FFDNet().eval()
    model.load_state_dict(weights("FFDNet"))
    clean, noisy = crops(TESTED, 16, 128, 1000 + seed)

    @torch.no_grad()
    def psnr(model: nn.Module) -> float:
        out = torch.cat([model(x, SIGMA).clamp(0, 1) for x in noisy.split(4)])
        return float((-10 * (out - clean).square().mean((1, 2, 3)).log10()).mean())

    return model, [(x, SIGMA) for x in crops(CALIBRATED, 24, 64, 2000 + seed)[1].split(4)], psnr


def retrieval(seed: int, n_test: int = 1000, n_calibration: int = 256) -> tuple[nn.Module, list, Callable]:
    """Return MiniLM, its calibration batches, and its score."""
    from tokenizers import Tokenizer
    from transformers import BertConfig, BertModel

    model = BertModel(BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536))
    state = {name: x for name, x in weights("MiniLM-L6").items() if not name.endswith("position_ids")}
    model.eval().load_state_dict(state)
    tokenizer = Tokenizer.from_str(content(MINILM_TOKENIZER).decode())
    tokenizer.enable_truncation(64)
    tokenizer.enable_padding()
    entries = glosses()
    order = torch.randperm(len(entries), generator=torch.Generator().manual_seed(seed)).tolist()
    test, rest = ([entries[i] for i in part] for part in (order[:n_test], order[n_test : n_test + n_calibration]))

    def batches(texts: list[str]) -> list[tuple[list[int], dict[str, Tensor]]]:
        """Return texts of about one length together: where they lie in the list, and their tokens."""
        ranked, found = sorted(range(len(texts)), key=lambda i: len(texts[i])), []
        for start in range(0, len(texts), 32):
            at = ranked[start : start + 32]
            coded = tokenizer.encode_batch([texts[i] for i in at])
            tokens, mask = (torch.tensor([getattr(x, key) for x in coded]) for key in ("ids", "attention_mask"))
            found.append((at, {"input_ids": tokens, "attention_mask": mask}))
        return found

    @torch.no_grad()
    def encode(model: nn.Module, texts: list[str]) -> Tensor:
        out = torch.empty(len(texts), 384)
        for at, batch in batches(texts):
            hidden, mask = model(**batch).last_hidden_state, batch["attention_mask"][..., None]
            out[at] = F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)
        return out

    def first(model: nn.Module) -> float:
        words, definitions = (encode(model, [entry[i] for entry in test]) for i in (0, 1))
        return float(((words @ definitions.T).argmax(1) == torch.arange(len(test))).float().mean())

    return model, [batch for _, batch in batches([gloss for _, gloss in rest])], first


def resident(reset: bool = False) -> float:
    """Return the peak of the resident memory in GB since the last reset; NaN where the system does not tell."""
    status = Path("/proc/self/status")
    if not status.exists():
        return math.nan
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1e6


def stored(model: nn.Module, calibration: list, compression: float, how: str) -> tuple[nn.Module, float, float, float]:
    """Return the network loaded from the file, the file's ratio, process seconds, and peak extra memory in GB."""
    before, start = resident(reset=True), time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.muws"
        if how == HOWS[2]:
            saved = save_compressed(model, path, compression=compression)
        else:
            small, _ = compress(model, compression, calibration if how == HOWS[0] else None)
            saved = save_compressed(small, path)
        seconds, extra = time.process_time() - start, resident() - before
        loaded = copy.deepcopy(model)
        loaded.load_state_dict(load_compressed(path))
    return loaded, saved.compression_ratio, seconds, extra


def spread(values: list[float], digits: int) -> str:
    """Return the mean, and the standard deviation if there are several values."""
    text = f"{mean(values):.{digits}f}"
    return f"{text} +- {stdev(values):.{digits}f}" if len(values) > 1 else text


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--networks", nargs="+", default=["FFDNet", "MiniLM"], choices=["FFDNet", "MiniLM"])
    options.add_argument("--compressions", type=float, nargs="+", default=[4, 8], help="with all seeds")
    options.add_argument("--sizes", type=float, nargs="*", default=[10, 20, 50, 100], help="with the first seed alone")
    options.add_argument("--seeds", type=int, default=3)
    chosen = options.parse_args()
    say_machine()
    for name in chosen.networks:
        make, unit, digits = (denoising, "dB", 2) if name == "FFDNet" else (retrieval, "R@1", 3)
        dense: list[float] = []
        found: dict[tuple[float, str], list[tuple[float, ...]]] = {}
        for seed in range(chosen.seeds):
            model, calibration, score = make(seed)
            dense.append(score(model))
            for compression in [*chosen.compressions, *([] if seed else chosen.sizes)]:
                for how in HOWS:
                    loaded, *numbers = stored(model, calibration, compression, how)
                    row = (dense[-1] - score(loaded), *numbers)
                    found.setdefault((compression, how), []).append(row)
                    console.print(name, seed, compression, how, *(f"{number:.3f}" for number in row), style="dim")
        table = Table(title=f"{name}: dense {spread(dense, digits)} {unit}, {chosen.seeds} seeds, mean +- deviation")
        for header in ("requested", "how", f"lost {unit}", "file ratios", "seconds", "extra memory GB"):
            table.add_column(header)
        for (compression, how), rows in found.items():
            lost, ratios, seconds, extra = (list(column) for column in zip(*rows, strict=True))
            each = " ".join(f"{ratio:.2f}" for ratio in ratios)
            table.add_row(
                f"{compression:g}", how, spread(lost, digits), each, f"{mean(seconds):.1f}", f"{max(extra):.2f}"
            )
        console.print(table)


if __name__ == "__main__":
    main()
