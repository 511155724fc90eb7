"""Random `.muws` files that use all of the format: dtypes, kinds of blocks, filters, palettes, loss, shared tensors."""

import random
from pathlib import Path

import torch

from lightning_muws import MicroStructure, save_compressed
from lightning_muws.artifact.manifest import DTYPES
from tests.support.strategies import DTYPES as FLOATS

FLOAT8 = [name for name in DTYPES if name.startswith("float8_")]
INTEGERS = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "bool")


def weight(r: random.Random, noise: torch.Generator) -> torch.Tensor:
    """Return a structured weight of 2 to 4 axes."""
    shape = [r.randint(1, 40), r.randint(1, 40), *(r.randint(1, 4) for _ in range(r.randint(0, 2)))]
    blocks = r.choice([(1, 1), (2, 2), (2, 4), (3, 2), (4, 4), (1, 8), (8, 1), (5, 3)])
    prune, unify = r.choice([(0.0, 0.0), (0.3, 0.4), (0.6, 0.3), (0.0, 0.9), (1.0, 0.0), (0.5, 0.5)])
    structure = MicroStructure(blocks, prune, unify, r.choice(["free", "shared"]))
    return structure.project(torch.randn(shape, generator=noise, dtype=torch.float64)).to(r.choice(FLOATS))


def any_bits(r: random.Random, noise: torch.Generator) -> torch.Tensor:
    """Return floats of any bits: NaN, infinities, subnormals."""
    shape, dtype = [r.randint(0, 12) for _ in range(r.randint(0, 3))], r.choice(FLOATS)
    raw = torch.randint(0, 256, (*shape, dtype.itemsize), generator=noise).to(torch.uint8)
    return raw.view(dtype).reshape(shape) if raw.numel() else torch.empty(shape, dtype=dtype)


def other(r: random.Random, noise: torch.Generator) -> torch.Tensor:
    """Return numbers of another dtype."""
    shape = [r.randint(0, 9) for _ in range(r.randint(0, 3))]
    if r.random() < 0.2:
        return torch.randn(shape, generator=noise).to(r.choice([torch.complex64, torch.complex128]))
    if r.random() < 0.3:
        return torch.randint(0, 256, shape, generator=noise).to(torch.uint8).view(DTYPES[r.choice(FLOAT8)])
    return torch.randint(0, 100, shape, generator=noise).to(DTYPES[r.choice(INTEGERS)])


def filtered(r: random.Random, noise: torch.Generator) -> torch.Tensor:
    """Return a mask or indices, for which the writer uses filters."""
    n = r.randint(20, 120)
    match r.randrange(5):
        case 4:
            return torch.ones(3 * n, 3 * n, dtype=torch.bool).tril().triu(-n // 3)
        case 0:
            return torch.ones(n, n, dtype=torch.bool).tril(r.randint(-5, 5))
        case 1:
            few = torch.rand(n // 4, n // 4, generator=noise) > 0.5
            return few.repeat_interleave(4, 0).repeat_interleave(r.randint(1, 4), 1)
        case 2:
            return (torch.arange(n)[:, None] - torch.arange(n) + n).to(r.choice([torch.int32, torch.int64]))
        case _:
            return torch.arange(20 * n).repeat(r.randint(1, 3), 1)


def repeated(r: random.Random, noise: torch.Generator) -> torch.Tensor:
    """Return few values many times, for which the writer uses a palette or a step; or a weight of bytes in blocks."""
    shape = (r.randint(50, 90), r.randint(60, 100))
    if r.random() < 0.4:
        steps = (
            MicroStructure((4, 4), 0.6, 0.3)
            .project(torch.randn(shape, generator=noise))
            .mul(30)
            .round()
            .clamp(-127, 127)
        )
        return steps.to(torch.int8) if r.random() < 0.5 else steps.add(128).to(torch.uint8)
    if r.random() < 0.4:
        return (torch.randint(-9, 9, shape, generator=noise) * 0.125).to(r.choice(FLOATS))
    values = torch.randn(r.randint(3, 40), generator=noise, dtype=torch.float64).to(r.choice(FLOATS))
    return values[torch.randint(0, len(values), shape, generator=noise)]


def random_file(seed: int, path: Path) -> None:
    """Write a file."""
    r, noise = random.Random(seed), torch.Generator().manual_seed(seed)  # noqa: S311  no secret
    settings = r.choice(
        [
            {},
            {},
            {"max_error": r.choice([1e-4, 0.003, 0.05]), "lossy": r.choice(["weights", "all"])},
            {"value_dtype": r.choice(["float16", "bfloat16"]), "lossy": "all"},
            {"blocks": r.choice([(1, 1), (2, 3), (4, 4)])},
            {"extra": {"seed": seed, "text": "\u00e9\U0001f600\n", "list": [1, 2.5, None, True]}},
        ]
    )
    state: dict[str, torch.Tensor] = {}
    for i in range(r.randint(0, 6)):
        make = r.choice([weight, weight, weight, any_bits, other, filtered, repeated])
        tensor = make(r, noise)
        if state and r.random() < 0.2:
            tensor = r.choice(list(state.values()))
            tensor = tensor.clone() if r.random() < 0.5 else tensor
        state[r.choice(["", "layer.", '\u00e9\n"', "\U0001f600"]) + str(i)] = tensor
    if "lossy" in settings:  # values that are not finite stay exact; others get coarser
        state = {
            name: x.nan_to_num(0, 1, -1).clamp(-8, 8) if x.is_floating_point() and x.dtype in FLOATS else x
            for name, x in state.items()
        }
    if r.random() < 0.15:
        groups = r.choice([1, 2, 4])
        module = torch.nn.ConvTranspose2d(8, 2 * groups, r.randint(1, 3), groups=groups)
        torch.nn.init.uniform_(module.weight, -1, 1, generator=noise)
        module.weight.data[: r.randint(0, 8)] = 0.5
        torch.nn.init.ones_(module.bias)
        save_compressed(module, path, blocks=r.choice([(1, 2), (2, 2), (2, 3)]))
    else:
        save_compressed(state, path, **settings)
