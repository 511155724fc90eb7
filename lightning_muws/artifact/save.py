"""Writes a `.muws` file."""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from lightning_muws.artifact.block_shape import shared_shapes, smallest_shape
from lightning_muws.artifact.container import MOST, check_place
from lightning_muws.artifact.json_text import dump, why_unstorable
from lightning_muws.artifact.load import MAX_BYTES, Progress
from lightning_muws.artifact.manifest import Manifest, TensorEntry
from lightning_muws.artifact.precision import Offer, allowed_forms, candidate, fit
from lightning_muws.artifact.report import SaveReport
from lightning_muws.artifact.source import Source, State, read_state
from lightning_muws.artifact.values import STEPS, Form, Loss
from lightning_muws.artifact.writer import CHUNK_BYTES, PALETTE_BYTES, ChooseGrid, Draft, Drafts, is_large_tensor
from lightning_muws.errors import FormatError, SettingError
from lightning_muws.structure.cost import TENSOR_BYTES, check_compression
from lightning_muws.structure.grid import BlockGrid

CHUNK_ENTRY_BYTES = 2 << 10  # that a manifest has at most on a chunk: 40 streams of 45


def save_compressed(
    model: Source,
    path: str | Path,
    *,
    blocks: Mapping[str, BlockGrid] | tuple[int, int] | None = None,
    max_error: float = 0.0,
    relative_to: Literal["tensor_max", "model_max", "absolute"] = "tensor_max",
    value_dtype: Literal["float16", "bfloat16"] | None = None,
    lossy: Literal["weights", "all"] | None = None,
    compression: float | None = None,
    parameters: Collection[str] | None = None,
    steps: Mapping[str, float] | None = None,
    extra: Mapping[str, Any] | None = None,
    max_bytes: int = MAX_BYTES,
    progress: Progress | None = None,
) -> SaveReport:
    """Write a model to a `.muws` file and return a report of its size.

    Without ``max_error`` and ``value_dtype`` the file is lossless. It is written to a temporary file, synced, then
    renamed, so that a crash or a full disk keeps the old file.

    Args:
        model: A module, a state_dict, a checkpoint with a ``state_dict`` (its weights are taken), or the path of a file
            of these; also an index of several safetensors files, or their folder. Of a safetensors file one tensor at
            a time is in memory.
        path: The file to write.
        blocks: How weights are cut, by name, as a plan's grids; or one block shape for all. Other weights get the
            shape that makes the file smallest, or keep that of the `.muws` file that they come from.
        max_error: How far a weight may move; 0 for not at all. Values become whole multiples of a step. No unified
            block is broken or becomes zero, and a tensor that is smaller exact, or not finite, stays exact.
        relative_to: What ``max_error`` is a share of: ``tensor_max`` or ``model_max``, the largest ``|w|``; or nothing,
            ``absolute``.
        value_dtype: Round values to this dtype instead; they come back in their own.
        lossy: ``weights``: only parameters of two or more axes lose anything, biases, norms and buffers stay exact; or
            ``all`` floating tensors. By default ``weights``, and ``all`` with ``compression``.
        compression: How many times smaller than its tensors the file is at least, above 1; instead of ``max_error``.
            The network loses as little of the energy of its tensors as that allows: each weight gets a step, other
            parameters a step where it pays, and buffers at most float16. The file is at most 5 % smaller than needed
            wherever such a file exists. Several files are coded until one fits, and ``progress`` begins again for each.
        parameters: Names of the model's parameters, for ``compression`` of a state_dict, which does not tell parameters
            from buffers. By default those of the module; without a module, tensors of one axis get at most float16.
        steps: With ``compression``, steps of which parameters are whole multiples already, by name: those they were
            trained with. They are looked for without it, too, but in half precision they may not be found.
        extra: Your own values to keep in the manifest: what JSON can hold, keys being strings, nested at most 64 deep.
            Tuples come back as lists. By default those of the `.muws` file that the model comes from.
        max_bytes: The most bytes that the tensors of a file may take in memory if they are smaller in the file: those
            of a `.muws` file, and compressed or repeated ones of a file that torch.save wrote.
        progress: Called with the bytes done and all bytes. What it raises ends the call, and passes as it is.

    Raises:
        SettingError: A setting is not allowed, no file is as small as requested, or the model holds anything that a
            file cannot.
        FormatError: The model has so many tensors, or ``extra`` is so large, that no reader would accept the manifest.
        OSError: The file cannot be written; an earlier file at that place is unchanged.

    Example:
        >>> import tempfile, torch
        >>> from lightning_muws import MicroStructure, load_compressed
        >>> layer = torch.nn.Linear(64, 64)
        >>> layer.weight.data = MicroStructure(prune_ratio=0.9).project(layer.weight.data)
        >>> path = Path(tempfile.mkdtemp()) / "layer.muws"
        >>> save_compressed(layer, path).compression_ratio > 5
        True
        >>> layer.load_state_dict(load_compressed(path))
        <All keys matched successfully>
    """
    loss, path = Loss(max_error, relative_to, value_dtype, "weights" if lossy is None else lossy), Path(path)
    if compression is not None:
        check_compression(compression)
        if loss:
            raise SettingError(
                f"compression={compression}, max_error={max_error} and value_dtype={value_dtype!r} are different ways "
                "to lose precision: give one of them"
            )
    check_place(path)
    state = read_state(model, max_bytes)
    _check_blocks(blocks, state)
    if not isinstance(blocks, tuple):
        blocks = {**state.grids, **(blocks or {})}
    own = check_manifest(state, blocks, state.extra if extra is None else extra)
    with Drafts(path, own, progress) as drafts:
        if compression is None:
            draft = drafts.code(state, grid_chooser(state, blocks), loss=loss)
        else:
            allowed = allowed_forms(model, state, lossy or "all", parameters)
            draft = fit_size(state, blocks, allowed, compression, drafts, steps)
        return draft.put(path, is_lossy=bool(loss or compression))


def fit_size(
    state: State,
    blocks: Mapping[str, BlockGrid] | tuple[int, int] | None,
    allowed: Mapping[str, tuple[str, ...]],
    compression: float,
    drafts: Drafts,
    steps: Mapping[str, float] | None = None,
) -> Draft:
    """Return the largest file that is so many times smaller than its tensors.

    Args:
        state: All tensors.
        blocks: As in :func:`save_compressed`.
        allowed: What each may be stored in besides its exact form, by name: see :func:`candidate`.
        compression: How many times smaller.
        drafts: Codes the files.
        steps: Of which tensors may be whole multiples, by name.

    Raises:
        SettingError: No file is as small as that.
    """
    choose_grid = grid_chooser(state, blocks)
    grids = {name: choose_grid(name, x.read()) for name, x in state.tensors.items() if x.is_cuttable}
    owned = {x.key: name for name, x in reversed(state.tensors.items())}  # the first name of shared ones
    dense_bytes = sum(state.tensors[name].nbytes for name in owned.values())
    found, others = {}, 0
    for name in owned.values():
        if name in grids:
            x, step = state.tensors[name].read(), (steps or {}).get(name, 0.0)
            found[name] = candidate(x, grids[name], allowed.get(name, ()), step=step)
        else:
            others += state.tensors[name].nbytes

    def code(cut: Mapping[str, BlockGrid | None], forms: Mapping[str, Form]) -> Draft:
        return drafts.code(state, lambda name, x: cut[name] if name in cut else choose_grid(name, x), forms)

    def encode(offers: Mapping[str, Offer]) -> tuple[int, Draft]:
        draft = code(grids, {name: offer.form for name, offer in offers.items()})
        return draft.n_bytes, draft

    if any(one.exact.step for one in found.values()):  # they were rounded for such a file before: perhaps it fits
        is_given = {name: isinstance(blocks, tuple) or name in (blocks or ()) for name in grids}
        flat = {name: grid if is_given[name] else None for name, grid in grids.items()}
        exact = {name: one.exact for name, one in found.items()}
        smallest = min((code(cut, exact) for cut in (grids, flat)), key=lambda draft: draft.n_bytes)
        if smallest.n_bytes <= dense_bytes / compression:
            return smallest
    return fit(found, others + TENSOR_BYTES * len(state.tensors), dense_bytes, compression, encode)


def grid_chooser(state: State, blocks: Mapping[str, BlockGrid] | tuple[int, int] | None) -> ChooseGrid:
    """Return the function that chooses how a floating tensor of a state is cut.

    Args:
        state: All tensors.
        blocks: Grids by name, or one block shape for all; others get the shape that makes the file smallest.
    """
    tiny = {} if isinstance(blocks, tuple) else shared_shapes(state.tensors)
    return partial(_grid, blocks=blocks, shared=tiny)


def _grid(
    name: str,
    x: Tensor,
    blocks: Mapping[str, BlockGrid] | tuple[int, int] | None,
    shared: Mapping[str, tuple[int, int] | None],
) -> BlockGrid | None:
    """Return how a weight is cut; None where it is flat."""
    if isinstance(blocks, Mapping) and name in blocks:
        grid: BlockGrid | None = blocks[name].unbatched(x.shape)
    elif x.ndim < 2 or not x.numel():
        grid = None
    else:
        given = blocks if isinstance(blocks, tuple) and x.element_size() > 1 else None
        shape = given or (shared[name] if name in shared else smallest_shape(x))
        grid = BlockGrid(shape) if shape else None
    if grid is None or 0 in grid.counts(x.shape):
        return None
    row_bytes = grid.block_shape[0] * grid.matrix_shape(x.shape)[1] * x.element_size()
    return grid if row_bytes <= CHUNK_BYTES else None


def _check_blocks(blocks: Mapping[str, BlockGrid] | tuple[int, int] | None, state: State) -> None:
    if isinstance(blocks, Mapping):
        if wrong := [name for name in blocks if name not in state.tensors or len(state.tensors[name].shape) < 2]:
            raise SettingError(
                f"blocks names {', '.join(wrong[:5])}, which is no tensor of two or more axes; "
                f"there are {', '.join(list(state.tensors)[:5])}"
            )
    elif blocks is not None:
        BlockGrid(blocks)


def check_manifest(
    state: State, blocks: Mapping[str, BlockGrid] | tuple[int, int] | None, extra: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Return ``extra`` as a dict that comes back equal; refuse a model whose manifest may become too large.

    Both are checked before any work on values, and all numbers count as long.

    Raises:
        SettingError: ``extra`` cannot be stored.
        FormatError: The manifest would be larger than a reader accepts.
    """
    if not isinstance(extra, (Mapping, type(None))):
        raise SettingError(f"extra is a {type(extra).__name__}, a dict is needed")
    own = dict(extra or {})
    if why := why_unstorable(own, "extra") or why_unstorable(state.modules, "the versions of the modules"):
        raise SettingError(f"this cannot be written as JSON: {why}")
    number = -sys.float_info.min  # no float has more digits
    form, usual = Form(STEPS, number), BlockGrid((16, 16))
    entries = []
    for name, x in state.tensors.items():
        dtype, shape, numel = str(x.dtype).removeprefix("torch."), tuple(x.shape), x.shape.numel()
        if x.dtype.is_floating_point:
            cut = blocks.get(name, usual) if isinstance(blocks, Mapping) else usual
            grid, counts = cut if len(shape) > 1 else None, (numel, numel, numel)
            entries.append(TensorEntry(name, dtype, shape, form, grid, counts, number))
        else:
            entries.append(TensorEntry(name, dtype, shape))
    n_bytes = len(dump(Manifest(tuple(entries), (), state.modules, own).to_dict()))
    n_chunks = 2 + 2 * sum(entry.n_bytes for entry in entries) // CHUNK_BYTES  # any two together have CHUNK_BYTES
    n_chunks += 2 * sum(is_large_tensor(entry.n_bytes) for entry in entries)  # but where a large tensor begins or ends
    if (n_bytes := n_bytes + n_chunks * CHUNK_ENTRY_BYTES + PALETTE_BYTES) > MOST:
        raise FormatError(
            f"the manifest would have up to {n_bytes} bytes for {len(entries)} tensors, at most {MOST} are allowed: "
            "save the model in several files"
        )
    return own
