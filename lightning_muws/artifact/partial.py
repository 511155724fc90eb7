"""Reads single tensors of a `.muws` file, or rows of them, and only the chunks that hold them."""

from __future__ import annotations

import contextlib
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from lightning_muws.artifact.container import Frame
from lightning_muws.artifact.load import (
    MAX_BYTES,
    blaming,
    check_device,
    check_max_bytes,
    check_size,
    chosen,
    decoded,
    empty_units,
    opened,
    piece_units,
    readers,
    stored_entry,
)
from lightning_muws.artifact.manifest import DTYPES, Manifest, Piece, TensorEntry
from lightning_muws.artifact.opening import Readable
from lightning_muws.errors import SettingError, StateError
from lightning_muws.structure.grid import is_whole


class CompressedFile:
    """An open `.muws` file. Make it with :func:`open_compressed`; close it, or use it in a ``with`` statement."""

    def __init__(self, path: Readable, max_bytes: int, device: str | torch.device) -> None:
        self._path, self._max_bytes, self._device = path, max_bytes, device
        self._open = contextlib.ExitStack()
        self._frame, self._manifest = self._open.enter_context(opened(path))
        self._entries = {entry.name: entry for entry in self._manifest.tensors}
        self._is_open = True

    def __enter__(self) -> CompressedFile:
        """Return it."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Close the file."""
        self.close()

    def close(self) -> None:
        """Close the file; one that the caller had opened stays open."""
        self._is_open = False
        self._open.close()

    # ---- what the manifest has: nothing is read

    def keys(self) -> list[str]:
        """Return the names of all tensors, in the order of the state_dict."""
        return list(self._entries)

    def __contains__(self, name: object) -> bool:
        """Return whether the file has a tensor of this name."""
        return name in self._entries

    def __len__(self) -> int:
        """Return the number of tensors."""
        return len(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        return self._entry(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of a tensor."""
        found: torch.dtype = DTYPES[self._entry(name).dtype]
        return found

    @property
    def n_bytes(self) -> int:
        """Bytes of the file."""
        return self._frame.n_bytes

    @property
    def extra(self) -> dict[str, Any]:
        """The user's own values."""
        return dict(self._manifest.extra)

    # ---- tensors

    def get_tensor(self, name: str) -> Tensor:
        """Return a tensor, bit for bit that of :func:`lightning_muws.load_compressed`.

        The chunks that hold it are read, one at a time in memory. Tensors that are shared in the model come back as
        separate ones.

        Raises:
            FormatError: What is read is damaged, or takes more than ``max_bytes``.
            SettingError: There is no such tensor.
            StateError: The file is closed.
        """
        entry = self._checked(name, self._entry(name).n_bytes)
        return decoded(self._path, self._frame, self._manifest, [entry], self._device)[name]

    def get_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return ``tensor[start:stop]`` of a tensor: its slices ``start`` to ``stop - 1`` along the first axis.

        Only the chunks that hold these rows are read; for weights of transposed convolutions, whose blocks do not lie
        along the first axis, all chunks of the tensor.

        Args:
            name: The tensor.
            start: The first row, from 0.
            stop: The row after the last one, at most the number of rows.

        Raises:
            FormatError: What is read is damaged, or takes more than ``max_bytes``.
            SettingError: There is no such tensor, it has no axes, or the rows are not in it.
            StateError: The file is closed.
        """
        shape = self.shape(name)
        if not shape or not is_whole(start) or not is_whole(stop) or not 0 <= start <= stop <= shape[0]:
            allowed = f"whole numbers with 0 <= start <= stop <= {shape[0]}" if shape else "get_tensor for a scalar"
            raise SettingError(f"start={start!r}, stop={stop!r} are no rows of {name} of shape {shape}: give {allowed}")
        stored = stored_entry(self._manifest, self._entry(name))
        if stored.grid and stored.grid.out_axis:
            return self.get_tensor(name)[start:stop].clone()
        row_bytes = stored.n_bytes // max(1, shape[0])
        self._checked(name, (stop - start) * row_bytes)
        units = _rows(self._path, self._frame, self._manifest, stored, start, stop)
        return units.reshape(stop - start, *shape[1:]).to(self._device)

    def _entry(self, name: str) -> TensorEntry:
        if name not in self._entries:
            chosen(self._manifest, [name])  # raises, unless it is a pattern
            raise SettingError(f"{name!r} is a pattern: give the name of one tensor, of keys()")
        return self._entries[name]

    def _checked(self, name: str, n_bytes: int) -> TensorEntry:
        """Return an entry if so many bytes of it may be read."""
        if not self._is_open:
            raise StateError(f"{self._path} is closed: read inside the with statement of open_compressed")
        with blaming(self._path):
            check_size(n_bytes, self._max_bytes)
        return self._entries[name]


def open_compressed(
    path: Readable, *, max_bytes: int = MAX_BYTES, device: str | torch.device = "cpu"
) -> CompressedFile:
    """Open a `.muws` file to read single tensors, or rows of them, without the others; as safetensors' ``safe_open``.

    Opening reads the header and the manifest. A tensor takes the chunks that hold it: `save_compressed` starts one at
    each tensor of 8 MiB and more, and codes smaller tensors together in chunks of up to 32 MiB.

    Args:
        path: The file; also a URL, of which only these parts are requested (extra ``remote``), or a file that is open
            for reading and can seek.
        max_bytes: The most bytes that a tensor, or its rows, may take; a tiny file can rightly ask for very many.
        device: Where tensors go.

    Raises:
        FormatError: The file is no `.muws` file, or its manifest is damaged.
        SettingError: ``max_bytes`` is no whole number >= 0, the device cannot be used, or the source cannot be opened,
            see :func:`lightning_muws.artifact.opening.opened_bytes`.

    Example:
        >>> import io, tempfile
        >>> from pathlib import Path
        >>> from lightning_muws import save_compressed
        >>> path = Path(tempfile.mkdtemp()) / "model.muws"
        >>> _ = save_compressed(torch.nn.Linear(3, 4), path)
        >>> with open_compressed(path) as file:
        ...     file.keys(), file.shape("weight"), file.get_rows("weight", 1, 3).shape
        (['weight', 'bias'], (4, 3), torch.Size([2, 3]))
    """
    check_max_bytes(max_bytes)
    check_device(device)
    return CompressedFile(path, max_bytes, device)


def _rows(path: Readable, frame: Frame, manifest: Manifest, entry: TensorEntry, start: int, stop: int) -> Tensor:
    """Return the units of rows ``start`` to ``stop``: rows of the matrix, or the elements of a flat tensor."""
    per_row = entry.matrix_shape[0] // max(1, entry.shape[0])
    low, high = start * per_row, stop * per_row
    units = empty_units(entry, high - low)

    def overlaps(piece: Piece) -> bool:
        return piece.entry is entry and max(low, piece.start) < min(high, piece.stop)

    for piece, reader in readers(path, frame, manifest, overlaps):
        first, last = max(low, piece.start), min(high, piece.stop)
        found = piece_units(path, piece, reader)
        units[first - low : last - low] = found[first - piece.start : last - piece.start]
    return units
