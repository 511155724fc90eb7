"""Reads a `.muws` file: its tensors, its manifest alone, or all of it to check that it is intact."""

from __future__ import annotations

import contextlib
import difflib
import fnmatch
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import IO

import numpy as np
import torch
from torch import Tensor, nn

from lightning_muws.artifact import native
from lightning_muws.artifact.chunk import ChunkReader, n_blocks, tally
from lightning_muws.artifact.container import Frame
from lightning_muws.artifact.entropy import Bytes
from lightning_muws.artifact.into import check_fit, fill
from lightning_muws.artifact.manifest import DTYPES, Manifest, Piece, TensorEntry, piece_bytes
from lightning_muws.artifact.opening import Readable, name_of, opened_bytes
from lightning_muws.artifact.parts import decode
from lightning_muws.artifact.report import FileInfo, tensor_report
from lightning_muws.artifact.streams import DENSE, KINDS_A_BYTE, N_KINDS, count_kinds, slabs
from lightning_muws.artifact.values import displayed
from lightning_muws.errors import FormatError, LimitError, MuwsError, SettingError, StateError
from lightning_muws.structure.grid import is_whole

MAX_BYTES = 8 << 30
KEPT_BYTES = 16 << 20  # of packed kinds: those of 3 GB in blocks of 4x4
Progress = Callable[[int, int], None]  # bytes of tensors done, and of all


def load_compressed(
    path: Readable,
    into: nn.Module | None = None,
    *,
    max_bytes: int = MAX_BYTES,
    device: str | torch.device = "cpu",
    names: Collection[str] | None = None,
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """Return the state_dict that a `.muws` file holds, ready for the model's ``load_state_dict``.

    The manifest is checked before memory for tensors is taken, and every stream against its checksum. No code in the
    file is run.

    Args:
        path: The file; also a URL (extra ``remote``), or a file that is open for reading and can seek.
        into: A module to load it into as well; its names and shapes are compared before anything is decoded. What is
            on the meta device gets the tensors themselves, in the dtype of the module, so that no weight is in memory
            twice. Buffers that no state_dict holds stay on the meta device.
        max_bytes: The most bytes that all tensors together may take; a tiny file can rightly ask for very many.
        device: Where the tensors go.
        names: The tensors to load, exact names or patterns such as ``encoder.*``; by default all. Only the chunks that
            hold them are read, and only these tensors of ``into`` are compared and replaced.
        progress: Called with the bytes done and all bytes. What it raises ends the call, and passes as it is.

    Returns:
        Each tensor by name, in the order of the model; shared ones are one tensor, and only those.

    Raises:
        FormatError: The file is no `.muws` file, or damaged; LimitError, one of these, if it is larger than
            ``max_bytes``.
        SettingError: ``max_bytes`` is no whole number >= 0, the device cannot be used, a name is not in the file, or
            the source cannot be opened, see :func:`lightning_muws.artifact.opening.opened_bytes`.
        StateError: The file does not fit ``into``, which is unchanged.
    """
    check_max_bytes(max_bytes)
    check_device(device)
    state, _ = read_compressed(path, into, max_bytes=max_bytes, device=device, names=names, progress=progress)
    return state


def read_compressed(
    path: Readable,
    into: nn.Module | None = None,
    *,
    max_bytes: int = MAX_BYTES,
    device: str | torch.device = "cpu",
    names: Collection[str] | None = None,
    progress: Progress | None = None,
) -> tuple[dict[str, Tensor], Manifest]:
    """Return what :func:`load_compressed` returns, and the manifest of the file."""
    with opened(path) as (frame, manifest):
        wanted = manifest.tensors if names is None else chosen(manifest, names)
        with blaming(path):
            check_size(manifest.n_bytes if names is None else sum(entry.n_bytes for entry in wanted), max_bytes)
            if into is not None:
                check_fit(wanted, into, is_all=names is None)
        state = decoded(path, frame, manifest, wanted, device, progress)
    if manifest.modules:
        state._metadata = dict(manifest.modules)  # type: ignore[attr-defined]
    if into is not None:
        fill(into, state)
    return state, manifest


def inspect_compressed(path: Readable) -> FileInfo:
    """Return a description of a `.muws` file from its manifest alone; no weights are decoded.

    Raises:
        FormatError: The file is no `.muws` file, or its manifest is damaged.
    """
    with opened(path) as (frame, manifest):
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
            name_of(path), version, frame.n_bytes, manifest.n_bytes, tensors, dict(streams), joined, manifest.extra
        )


def verify_compressed(path: Readable, *, max_bytes: int = MAX_BYTES, progress: Progress | None = None) -> FileInfo:
    """Decode a `.muws` file completely, check every checksum, and return what :func:`inspect_compressed` returns.

    It takes the memory of one chunk of the file, at most 256 MiB of tensors, and not that of all tensors.

    Raises:
        SettingError: ``max_bytes`` is no whole number >= 0.
        FormatError: The file is no `.muws` file, or damaged; LimitError, one of these, if it is larger than
            ``max_bytes``.
    """
    check_max_bytes(max_bytes)
    with opened(path) as (frame, manifest):
        with blaming(path):
            check_size(manifest.n_bytes, max_bytes)
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
def opened(path: Readable) -> Iterator[tuple[Frame, Manifest]]:
    """Open a file and check its header and manifest."""
    with opened_bytes(path) as file:
        with blaming(path):
            frame = Frame(file)
            manifest = Manifest.from_dict(frame.manifest)
            promised = [f"c{i}.{name}" for i, chunk in enumerate(manifest.chunks) for name in chunk.streams]
            if promised != list(frame.lengths):
                raise FormatError("the manifest declares other streams than the header")
        yield frame, manifest


@contextlib.contextmanager
def blaming(path: Readable) -> Iterator[None]:
    """Turn the errors of reading into those of the file, with its name; only code that reads a file runs in here."""
    try:
        yield
    except FormatError as error:
        raise type(error)(f"{name_of(path)}: {error}") from None
    except MuwsError:
        raise
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        if is_out_of_memory(error):
            raise
        raise FormatError(f"{name_of(path)}: the file contradicts itself ({type(error).__name__}: {error})") from error


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


def check_device(device: str | torch.device) -> None:
    """Check that tensors can go to a device, before anything is read.

    Raises:
        SettingError: They cannot.
    """
    try:
        torch.empty(0, device=device)
    except Exception as error:  # torch raises what each device raises
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise SettingError(f"device={str(device)!r} cannot be used here: {reason}; give 'cpu' or another one") from None


def check_size(n_bytes: int, max_bytes: int) -> None:
    """Check that the tensors to read are within the limit.

    Raises:
        LimitError: They are not.
    """
    if n_bytes > max_bytes:
        raise LimitError(
            f"its tensors take {n_bytes:,} bytes, at most max_bytes={max_bytes:,} are allowed: "
            "raise max_bytes if you trust the file"
        )


def chosen(manifest: Manifest, names: Collection[str]) -> tuple[TensorEntry, ...]:
    """Return the entries that names or patterns match, in the order of the file.

    Raises:
        SettingError: One matches none, or a string was given for a list.
    """
    if isinstance(names, str):
        raise SettingError(f"names={names!r} is one string: give a list, such as names=[{names!r}]")
    known = [entry.name for entry in manifest.tensors]
    found: set[str] = set()
    for name in names:
        matches = [name] if name in known else fnmatch.filter(known, name)
        if not matches:
            near = difflib.get_close_matches(name, known, n=1) or known[:3]
            raise SettingError(f"the file has no tensor {name!r}; it has {len(known)}, such as {', '.join(near)}")
        found.update(matches)
    return tuple(entry for entry in manifest.tensors if entry.name in found)


def decoded(
    path: Readable,
    frame: Frame,
    manifest: Manifest,
    entries: Sequence[TensorEntry],
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
) -> OrderedDict[str, Tensor]:
    """Return tensors of an open file by name; at most one chunk is in memory besides them."""
    sources = {entry.name: stored_entry(manifest, entry) for entry in entries}
    needed = {entry.name: entry for entry in sources.values()}
    total, done = sum(entry.n_bytes for entry in needed.values()), 0
    found = {name: empty_units(entry, 0).view(entry.shape) for name, entry in needed.items() if not entry.numel}
    units = torch.empty(0)
    for piece, reader in readers(path, frame, manifest, lambda piece: piece.entry.name in needed):
        entry = piece.entry
        if piece.start == 0:
            units = empty_units(entry, entry.matrix_shape[0])
        with blaming(path):
            reader.fill(piece, units[piece.start : piece.stop])
        done += piece_bytes(piece)
        if progress:
            progress(done, total)
        if piece.stop == len(units):
            found[entry.name] = as_tensor(entry, units).to(device)
    state: OrderedDict[str, Tensor] = OrderedDict()
    for entry in entries:
        value = found[sources[entry.name].name]
        state[entry.name] = value.clone() if entry.is_copy else value
    return state


def stored_entry(manifest: Manifest, entry: TensorEntry) -> TensorEntry:
    """Return the entry that has the values of this one."""
    return entry if entry.same_as is None else manifest.tensors[entry.same_as]


def as_tensor(entry: TensorEntry, units: Tensor) -> Tensor:
    """Return a tensor in its shape, contiguous, from all its units."""
    tensor = entry.grid.weight(units, torch.Size(entry.shape)) if entry.grid else units.view(entry.shape)
    return tensor.contiguous()


def _pieces(path: Readable, frame: Frame, manifest: Manifest) -> Iterator[tuple[Piece, Tensor]]:
    """Yield each piece with its decoded units, which are in memory only until the next one."""
    for piece, reader in readers(path, frame, manifest):
        units = piece_units(path, piece, reader)
        yield piece, units
        del units


def piece_units(path: Readable, piece: Piece, reader: ChunkReader) -> Tensor:
    """Return the decoded units of a piece."""
    units = empty_units(piece.entry, piece.stop - piece.start)
    with blaming(path):
        reader.fill(piece, units)
    return units


def empty_units(entry: TensorEntry, n: int) -> Tensor:
    """Return memory for so many units of a tensor."""
    shape = (n, entry.matrix_shape[1]) if entry.grid else (n,)
    units = torch.empty(shape, dtype=DTYPES[entry.dtype])
    native.large_pages(units.data_ptr(), units.numel() * units.element_size())
    return units


def readers(
    path: Readable, frame: Frame, manifest: Manifest, wanted: Callable[[Piece], bool] = lambda piece: True
) -> Iterator[tuple[Piece, ChunkReader]]:
    """Yield each piece that is wanted, in order, with the reader of its chunk; other chunks are not read."""
    chunks = {i: pieces for i, pieces in enumerate(manifest.pieces()) if not pieces or any(map(wanted, pieces))}
    with blaming(path):
        kinds = checked_kinds(frame, manifest, chunks)
    for i, pieces in chunks.items():
        with blaming(path):
            reader = _reader(frame, manifest, i, pieces, kinds.pop(i, None))
        for piece in pieces:
            if wanted(piece):
                yield piece, reader
            else:
                reader.skip(piece)
        del reader


def checked_kinds(frame: Frame, manifest: Manifest, chunks: Mapping[int, list[Piece]]) -> dict[int, Bytes]:
    """Compare the blocks of each tensor with the manifest, before memory is taken for any tensor.

    Returns:
        The packed kinds of the first chunks, so that they need not be decoded again; as many as take little memory.
    """
    kept: dict[int, Bytes] = {}
    room, counts, last = KEPT_BYTES, np.zeros(N_KINDS, np.int64), None
    for i, pieces in chunks.items():
        n, at = sum(n_blocks(piece)[0] for piece in pieces), 0
        packed = None
        if n and "kinds" in manifest.chunks[i].streams:
            packed = stream_bytes(frame, manifest, i, "kinds", -(-n // KINDS_A_BYTE))
            if (room := room - len(packed)) >= 0:
                kept[i] = packed
        for piece in pieces:
            if piece.entry is not last:
                counts, last = np.zeros(N_KINDS, np.int64), piece.entry
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


def _reader(frame: Frame, manifest: Manifest, i: int, pieces: list[Piece], kinds: Bytes | None) -> ChunkReader:
    """Return the reader of a chunk, all its streams decoded; ``kinds`` if they were decoded before."""
    left = set(manifest.chunks[i].streams)

    def read(name: str, n: int) -> Bytes:
        if not n or name not in left:
            return np.zeros(n, np.uint8)
        left.remove(name)
        return kinds if name == "kinds" and kinds is not None else stream_bytes(frame, manifest, i, name, n)

    reader = ChunkReader(pieces, read)
    if left:
        raise FormatError(f"chunk {i} has streams that belong to none of its tensors: {', '.join(sorted(left))[:100]}")
    return reader


def stream_bytes(frame: Frame, manifest: Manifest, i: int, name: str, n: int) -> Bytes:
    """Return the ``n`` bytes of a stream of a chunk."""
    coder, checksum = manifest.chunks[i].streams[name]
    return decode(coder, frame.stream(f"c{i}.{name}", checksum), n)
