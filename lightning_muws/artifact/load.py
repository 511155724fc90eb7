"""Reads a `.muws` file: its tensors, its manifest alone, or all of it to check that it is intact."""

from __future__ import annotations

import contextlib
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor, nn

from lightning_muws.artifact.chunk import ChunkReader, n_blocks, tally
from lightning_muws.artifact.container import Frame
from lightning_muws.artifact.entropy import Bytes
from lightning_muws.artifact.manifest import DTYPES, Manifest, Piece, TensorEntry, piece_bytes
from lightning_muws.artifact.parts import decode
from lightning_muws.artifact.report import FileInfo, tensor_report
from lightning_muws.artifact.streams import DENSE, KINDS_A_BYTE, N_KINDS, count_kinds, slabs
from lightning_muws.artifact.values import displayed
from lightning_muws.errors import FormatError, MuwsError, SettingError, StateError
from lightning_muws.structure.grid import is_whole
from lightning_muws.structure.plan import clean_name

MAX_BYTES = 8 << 30
KEPT_BYTES = 16 << 20  # of packed kinds: those of 3 GB in blocks of 4x4
Progress = Callable[[int, int], None]  # bytes of tensors done, and of all


def load_compressed(
    path: str | Path,
    into: nn.Module | None = None,
    *,
    max_bytes: int = MAX_BYTES,
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """Return the state_dict that a `.muws` file holds, ready for the model's ``load_state_dict``.

    The manifest is checked before memory for tensors is taken, and every stream against its checksum. No code in the
    file is run.

    Args:
        path: The file.
        into: A module to load it into as well; its names and shapes are compared before anything is decoded.
        max_bytes: The most bytes that all tensors together may take; a tiny file can rightly ask for very many.
        device: Where the tensors go.
        progress: Called with the bytes done and all bytes. What it raises ends the call, and passes as it is.

    Returns:
        Each tensor by name, in the order of the model; shared ones are one tensor, and only those.

    Raises:
        FormatError: The file is no `.muws` file, or damaged, or larger than ``max_bytes``.
        SettingError: ``max_bytes`` is no whole number >= 0, or the device cannot be used.
        StateError: The file does not fit ``into``, which is unchanged.
    """
    check_max_bytes(max_bytes)
    _check_device(device)
    state, _ = read_compressed(path, into, max_bytes=max_bytes, device=device, progress=progress)
    return state


def read_compressed(
    path: str | Path,
    into: nn.Module | None = None,
    *,
    max_bytes: int = MAX_BYTES,
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
) -> tuple[dict[str, Tensor], Manifest]:
    """Return what :func:`load_compressed` returns, and the manifest of the file."""
    with _opened(path) as (frame, manifest):
        with _blaming(path):
            _check_size(manifest, max_bytes)
            if into is not None:
                _check_fit(manifest, into)
        state: OrderedDict[str, Tensor] = OrderedDict()
        for entry, tensor in _tensors(path, frame, manifest, progress):
            if entry.same_as is None:
                state[entry.name] = tensor.to(device)
            else:
                first = state[manifest.tensors[entry.same_as].name]
                state[entry.name] = first.clone() if entry.is_copy else first
    if manifest.modules:
        state._metadata = dict(manifest.modules)  # type: ignore[attr-defined]
    if into is not None:
        mine = OrderedDict((name, state[clean_name(name)]) for name in into.state_dict())
        mine._metadata = dict(manifest.modules)  # type: ignore[attr-defined]
        into.load_state_dict(mine)
    return state, manifest


def inspect_compressed(path: str | Path) -> FileInfo:
    """Return a description of a `.muws` file from its manifest alone; no weights are decoded.

    Raises:
        FormatError: The file is no `.muws` file, or its manifest is damaged.
    """
    with _opened(path) as (frame, manifest):
        streams: dict[str, int] = defaultdict(int)
        coders: dict[str, set[str]] = defaultdict(set)
        for i, chunk in enumerate(manifest.chunks):
            for name, (coder, _) in chunk.streams.items():
                streams[displayed(name)] += frame.lengths[f"c{i}.{name}"]
                coders[displayed(name)].add(coder)
        tensors = tuple(tensor_report(entry, manifest.tensors) for entry in manifest.tensors)
        joined = {name: "+".join(sorted(found)) for name, found in coders.items()}
        version = frame.manifest["version"]
        return FileInfo(
            str(path), version, frame.n_bytes, manifest.n_bytes, tensors, dict(streams), joined, manifest.extra
        )


def verify_compressed(path: str | Path, *, max_bytes: int = MAX_BYTES, progress: Progress | None = None) -> FileInfo:
    """Decode a `.muws` file completely, check every checksum, and return what :func:`inspect_compressed` returns.

    It takes the memory of one chunk of the file, at most 256 MiB of tensors, and not that of all tensors.

    Raises:
        SettingError: ``max_bytes`` is no whole number >= 0.
        FormatError: The file is no `.muws` file, or damaged, or larger than ``max_bytes``.
    """
    check_max_bytes(max_bytes)
    with _opened(path) as (frame, manifest):
        with _blaming(path):
            _check_size(manifest, max_bytes)
        done, coded_bytes = 0, sum(entry.n_bytes for entry in manifest.tensors if entry.same_as is None)
        for _, units in _pieces(path, frame, manifest):
            done += units.numel() * units.element_size()
            if progress:
                progress(done, coded_bytes)
    return inspect_compressed(path)


def check_errors(file: IO[bytes], read: Callable[[str], Tensor], errors: Mapping[str, float]) -> None:
    """Decode an open file and compare it to the tensors that it was written from, a chunk at a time.

    Args:
        file: The file.
        read: Returns a tensor by name, contiguous and on the CPU.
        errors: The largest error of each tensor, by name.

    Raises:
        StateError: A decoded tensor differs from the original by more than its recorded error.
    """
    frame = Frame(file)
    original = torch.empty(0)
    for piece, units in _pieces("the file that was just written", frame, Manifest.from_dict(frame.manifest)):
        entry = piece.entry
        if entry.form is None:
            continue
        if piece.start == 0:
            original = read(entry.name)
            original = entry.grid.matrix(original) if entry.grid else original.view(-1)
        ours, theirs = units, original[piece.start : piece.stop]
        for part in slabs(len(ours), piece.entry.matrix_shape[1]):
            apart = ours[part].to(torch.float64) - theirs[part].to(torch.float64)
            if float(apart.nan_to_num_(0.0).abs_().max()) > errors[entry.name]:
                raise StateError(f"{entry.name} decodes to other values than were measured: please report this")


@contextlib.contextmanager
def _opened(path: str | Path) -> Iterator[tuple[Frame, Manifest]]:
    """Open a file and check its header and manifest."""
    with Path(path).open("rb") as file:
        with _blaming(path):
            frame = Frame(file)
            manifest = Manifest.from_dict(frame.manifest)
            promised = [f"c{i}.{name}" for i, chunk in enumerate(manifest.chunks) for name in chunk.streams]
            if promised != list(frame.lengths):
                raise FormatError("the manifest declares other streams than the header")
        yield frame, manifest


@contextlib.contextmanager
def _blaming(path: str | Path) -> Iterator[None]:
    """Turn the errors of reading into those of the file, with its name; only code that reads a file runs in here."""
    try:
        yield
    except FormatError as error:
        raise FormatError(f"{path}: {error}") from None
    except MuwsError:
        raise
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        if is_out_of_memory(error):
            raise
        raise FormatError(f"{path}: the file contradicts itself ({type(error).__name__}: {error})") from error


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error is that of a machine without enough memory, for which torch has no class on the CPU."""
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "allocate memory" in str(error))


def check_max_bytes(max_bytes: object) -> None:
    """Check a limit on the bytes of tensors.

    Raises:
        SettingError: It is no whole number >= 0.
    """
    if not is_whole(max_bytes) or max_bytes < 0:  # type: ignore[operator]
        raise SettingError(f"max_bytes={max_bytes!r} is not allowed: give a whole number >= 0, such as {MAX_BYTES}")


def _check_device(device: str | torch.device) -> None:
    """Check that tensors can go to a device, before anything is read."""
    try:
        torch.empty(0, device=device)
    except Exception as error:  # torch raises what each device raises
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise SettingError(f"device={str(device)!r} cannot be used here: {reason}; give 'cpu' or another one") from None


def _check_size(manifest: Manifest, max_bytes: int) -> None:
    if manifest.n_bytes > max_bytes:
        raise FormatError(
            f"its tensors take {manifest.n_bytes:,} bytes, at most max_bytes={max_bytes:,} are allowed: "
            "raise max_bytes if you trust the file"
        )


def _check_fit(manifest: Manifest, into: nn.Module) -> None:
    """Compare names and shapes, before any memory is taken."""
    own = {clean_name(name): tuple(x.shape) for name, x in into.state_dict().items()}
    there = {entry.name: entry.shape for entry in manifest.tensors}
    wrong = [name for name in {**own, **there} if own.get(name) != there.get(name)]
    if wrong:
        name = wrong[0]
        raise StateError(
            f"the file does not fit {type(into).__name__} at {len(wrong)} tensors, the first one {name!r}: of shape "
            f"{there.get(name, 'none')} in the file and {own.get(name, 'none')} in the module"
        )


def _tensors(
    path: str | Path, frame: Frame, manifest: Manifest, progress: Progress | None = None
) -> Iterator[tuple[TensorEntry, Tensor]]:
    """Yield each tensor in order, decoded; at most one chunk is in memory besides. A shared tensor comes out empty."""
    at, done, units = 0, 0, torch.empty(0)
    coded_bytes = sum(entry.n_bytes for entry in manifest.tensors if entry.same_as is None)
    for piece, reader in _readers(path, frame, manifest):
        entry = piece.entry
        if piece.start == 0:
            while manifest.tensors[at] is not entry:
                yield manifest.tensors[at], _without_values(manifest.tensors[at])
                at += 1
            units = _empty(entry, entry.matrix_shape[0])
        with _blaming(path):
            reader.fill(piece, units[piece.start : piece.stop])
        done += piece_bytes(piece)
        if progress:
            progress(done, coded_bytes)
        if piece.stop == len(units):
            tensor = entry.grid.weight(units, torch.Size(entry.shape)) if entry.grid else units.view(entry.shape)
            yield entry, tensor.contiguous()
            at += 1
    for entry in manifest.tensors[at:]:
        yield entry, _without_values(entry)


def _pieces(path: str | Path, frame: Frame, manifest: Manifest) -> Iterator[tuple[Piece, Tensor]]:
    """Yield each piece with its decoded units, which are in memory only until the next one."""
    for piece, reader in _readers(path, frame, manifest):
        units = _empty(piece.entry, piece.stop - piece.start)
        with _blaming(path):
            reader.fill(piece, units)
        yield piece, units
        del units


def _empty(entry: TensorEntry, n: int) -> Tensor:
    """Return memory for so many units of a tensor."""
    shape = (n, entry.matrix_shape[1]) if entry.grid else (n,)
    return torch.empty(shape, dtype=DTYPES[entry.dtype])


def _readers(path: str | Path, frame: Frame, manifest: Manifest) -> Iterator[tuple[Piece, ChunkReader]]:
    """Yield each piece in order, with the reader of its chunk."""
    with _blaming(path):
        kinds = _checked_kinds(frame, manifest)
    for i, pieces in enumerate(manifest.pieces()):
        with _blaming(path):
            reader = _reader(frame, manifest, i, pieces, kinds.pop(i, None))
        for piece in pieces:
            yield piece, reader
        del reader


def _checked_kinds(frame: Frame, manifest: Manifest) -> dict[int, Bytes]:
    """Compare the blocks of each tensor with the manifest, before memory is taken for any tensor.

    Returns:
        The packed kinds of the first chunks, so that they need not be decoded again; as many as take little memory.
    """
    kept: dict[int, Bytes] = {}
    room, counts = KEPT_BYTES, np.zeros(N_KINDS, np.int64)
    for i, pieces in enumerate(manifest.pieces()):
        n, at = sum(n_blocks(piece)[0] for piece in pieces), 0
        packed = None
        if n and "kinds" in manifest.chunks[i].streams:
            packed = _stream(frame, manifest, i, "kinds", -(-n // KINDS_A_BYTE))
            if (room := room - len(packed)) >= 0:
                kept[i] = packed
        for piece in pieces:
            if piece.start == 0:
                counts = np.zeros(N_KINDS, np.int64)
            here = n_blocks(piece)[0]
            if packed is None:
                counts[DENSE] += here
            else:
                counts += count_kinds(packed, at, at + here)
            at += here
            declared = piece.entry.counts
            if any(a > b for a, b in zip(tally(counts), declared, strict=True)):
                raise FormatError(f"{piece.entry.name} has blocks {tally(counts)}, the manifest declares {declared}")
    return kept


def _without_values(entry: TensorEntry) -> Tensor:
    """Return a tensor without elements; it stands for a shared one."""
    return torch.empty(entry.shape if entry.same_as is None else (0,), dtype=DTYPES[entry.dtype])


def _reader(frame: Frame, manifest: Manifest, i: int, pieces: list[Piece], kinds: Bytes | None) -> ChunkReader:
    """Return the reader of a chunk, all its streams decoded; ``kinds`` if they were decoded before."""
    left = set(manifest.chunks[i].streams)

    def read(name: str, n: int) -> Bytes:
        if not n or name not in left:
            return np.zeros(n, np.uint8)
        left.remove(name)
        return kinds if name == "kinds" and kinds is not None else _stream(frame, manifest, i, name, n)

    reader = ChunkReader(pieces, read)
    if left:
        raise FormatError(f"chunk {i} has streams that belong to none of its tensors: {', '.join(sorted(left))[:100]}")
    return reader


def _stream(frame: Frame, manifest: Manifest, i: int, name: str, n: int) -> Bytes:
    """Return the ``n`` bytes of a stream of a chunk."""
    coder, checksum = manifest.chunks[i].streams[name]
    return decode(coder, frame.stream(f"c{i}.{name}", checksum), n)
