"""Hypothesis strategies: weights of odd shapes, 2-D to 5-D, contiguous or not; structures to put on them."""

import torch
from hypothesis import strategies as st

from lightning_muws import MicroStructure, NMStructure
from lightning_muws.structure.grid import BlockGrid

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def small_integers(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@st.composite
def weights(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = DTYPES, max_side: int = 13) -> torch.Tensor:
    """Return a weight, normal or full of ties, in one of three memory layouts."""
    n_axes = draw(st.integers(2, 5))
    side = st.integers(1, max_side if n_axes == 2 else 5)
    shape = [draw(side) for _ in range(n_axes)]
    make = draw(st.sampled_from([normal, small_integers]))
    weight = make(draw(st.integers(0, 10**6)), *shape, dtype=draw(st.sampled_from(dtypes)))
    match draw(st.sampled_from(["contiguous", "transposed", "strided"])):
        case "transposed":
            return weight.transpose(0, -1).contiguous().transpose(0, -1)
        case "strided":
            return torch.stack([weight, -weight], dim=-1)[..., 0]
    return weight


@st.composite
def structures(draw: st.DrawFn) -> MicroStructure:
    """Return a structure; both ratios, one, or none."""
    shape = draw(st.sampled_from([(1, 1), (1, 2), (2, 2), (3, 2), (4, 1), (2, 5), (4, 4)]))
    prune, unify = draw(
        st.sampled_from([(0.0, 0.5), (0.5, 0.0), (0.3, 0.3), (0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (0.4, 0.6)])
    )
    return MicroStructure(shape, prune, unify, draw(st.sampled_from(["free", "shared"])))


def any_structures() -> st.SearchStrategy[MicroStructure | NMStructure]:
    """Return a structure of each kind."""
    return structures() | st.sampled_from([NMStructure(2, 4), NMStructure(1, 3), NMStructure(1, 2)])


OTHERS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.complex64)


@st.composite
def state_dicts(draw: st.DrawFn) -> dict[str, torch.Tensor]:
    """Return what a state_dict may be: any dtype and shape, any bits, structured weights, shared and overlapping."""
    state: dict[str, torch.Tensor] = {}
    for i in range(draw(st.integers(0, 5))):
        seed = draw(st.integers(0, 10**6))
        match draw(st.sampled_from(["structured", "any bits", "other", "few", "shared", "overlapping"])):
            case "structured":
                structure, w = draw(structures()), draw(weights(max_side=20))
                tensor = structure.project(w)
            case "any bits":  # NaN payloads, infinities, subnormals
                shape = draw(st.lists(st.integers(0, 6), max_size=4))
                dtype = draw(st.sampled_from(DTYPES))
                raw = torch.randint(0, 256, (*shape, dtype.itemsize), generator=torch.Generator().manual_seed(seed))
                tensor = (
                    raw.to(torch.uint8).view(dtype).reshape(shape) if raw.numel() else torch.empty(shape, dtype=dtype)
                )
            case "other":
                shape = draw(st.lists(st.integers(0, 6), max_size=4))
                tensor = torch.randint(-3, 3, shape, generator=torch.Generator().manual_seed(seed))
                tensor = tensor.to(draw(st.sampled_from(OTHERS)))
            case "few":
                tensor = small_integers(seed, 12, 9, dtype=draw(st.sampled_from(DTYPES))) * 0.1
            case "shared" if state:
                tensor = draw(st.sampled_from(list(state.values())))
            case "overlapping" if state:
                flat = draw(st.sampled_from(list(state.values()))).view(-1) if all_contiguous(state) else torch.ones(3)
                tensor = flat[len(flat) // 3 :]
            case _:
                tensor = torch.tensor(1.5)
        state[draw(st.sampled_from(["", "a.", '\u00e9\n"', "layer.0."])) + str(i)] = tensor
    return state


def all_contiguous(state: dict[str, torch.Tensor]) -> bool:
    return all(x.is_contiguous() for x in state.values())


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Return whether two tensors of any dtype are equal in dtype, shape and every bit."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return raw_bytes(a) == raw_bytes(b)


def raw_bytes(x: torch.Tensor) -> bytes:
    """Return the bytes of a tensor, row by row."""
    return x.reshape(-1).clone(memory_format=torch.contiguous_format).view(torch.uint8).numpy().tobytes()


@st.composite
def grids(draw: st.DrawFn, weight: torch.Tensor, block_shape: tuple[int, int]) -> BlockGrid:
    """Return a grid on the weight, its outputs on either axis, grouped where they can be."""
    out_axis = draw(st.sampled_from([0, 1]))
    if weight.ndim == 3 and weight.shape[1 + out_axis] % block_shape[0] == 0 and draw(st.booleans()):
        return BlockGrid(block_shape, out_axis, batched=True)
    divisors = [g for g in range(1, len(weight) + 1) if len(weight) % g == 0]
    return BlockGrid(block_shape, out_axis, draw(st.sampled_from(divisors)) if out_axis else 1)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Return whether two tensors hold the same bits, so that 0.0 and -0.0 differ."""
    as_int = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return (
        a.shape == b.shape
        and a.dtype == b.dtype
        and torch.equal(a.contiguous().view(as_int), b.contiguous().view(as_int))
    )
