"""The steps with which a file of a model has a requested size, found before the file is written."""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path

from lightning_muws.artifact.precision import allowed_forms
from lightning_muws.artifact.save import fit_size
from lightning_muws.artifact.source import Source, read_state
from lightning_muws.artifact.values import STEPS
from lightning_muws.artifact.writer import Drafts
from lightning_muws.structure.cost import check_compression
from lightning_muws.structure.grid import BlockGrid


def choose_steps(
    model: Source,
    blocks: Mapping[str, BlockGrid] | None = None,
    compression: float = 20.0,
    parameters: Collection[str] | None = None,
) -> dict[str, float]:
    """Return the step of each parameter with which the file is ``compression`` times smaller than the tensors.

    If a network trains on whole multiples of these steps, ``save_compressed(compression=)`` stores them without loss,
    in a file of about this size; buffers may still lose precision down to float16. Give the function to
    :class:`lightning_muws.CompressionRun` as its ``stepper``: ``functools.partial(choose_steps, model)``. Several files
    are coded until one fits.

    Args:
        model: A module, or its state_dict.
        blocks: How weights are cut, by name, as a plan's grids; see :func:`lightning_muws.save_compressed`.
        compression: How many times smaller, above 1.
        parameters: Names of the model's parameters; needed for a state_dict.

    Returns:
        Steps in units of the tensors, exact in float32, by name. A parameter that is stored exactly has none, as it is
        if all of it are whole multiples of some step already, and the file is small enough.

    Raises:
        SettingError: The compression is not allowed, or no file is as small as that.

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(64, 64)
        >>> sorted(choose_steps(layer, compression=4))
        ['bias', 'weight']
    """
    check_compression(compression)
    state = read_state(model)
    allowed = allowed_forms(model, state, "all", parameters)
    with tempfile.TemporaryDirectory() as folder, Drafts(Path(folder) / "model.muws", {}) as drafts:
        forms = fit_size(state, blocks, allowed, compression, drafts).writer.forms
    return {name: form.step for name, form in forms.items() if form.stored == STEPS and form.is_lossy}
