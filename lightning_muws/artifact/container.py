"""The frame of a file: a safetensors header and byte streams. Reading trusts nothing; writing is atomic."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
import shutil
import stat
import struct
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from lightning_muws.artifact import native
from lightning_muws.artifact.codecs import inflate
from lightning_muws.artifact.json_text import dump, parse
from lightning_muws.errors import FormatError, SettingError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

FORMAT = "muws"
VERSION, NEWEST = "1.0", "1.1"  # the lowest and the highest that this package writes; it reads both
MANIFEST = "manifest"
MOST = 16 << 20  # bytes of a header or a manifest
STALE_SECONDS = 60.0  # after which a temporary file that nobody has locked is that of a writer that was killed
LOOKS_LIKE = {b"PK": "a zip archive, such as torch.save writes", b"\x80": "a pickle", b"\x1f\x8b": "a gzip file"}


class Frame:
    """An open file with a checked header: its manifest, and its streams by name.

    Args:
        file: Open for reading, seekable.

    Attributes:
        n_bytes: The bytes of the file.
        lengths: The bytes of each stream of weights, by name.
        manifest: The JSON of the manifest.

    Raises:
        FormatError: It is no `.muws` file, has another major version or too large a header, or is damaged.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.n_bytes = file.seek(0, os.SEEK_END)
        file.seek(0)
        header = self._header()
        self.metadata = header.pop("__metadata__", None)
        version = self._check_metadata()
        self._spans = self._check_streams(header)
        self.lengths = {name: stop - start for name, (start, stop) in self._spans.items() if name != MANIFEST}
        self.manifest = self._read_manifest()
        if self.manifest.get("version") != version:
            raise FormatError(f"the header has version {version}, the manifest {self.manifest.get('version')!r}")

    def stream(self, name: str, checksum: int) -> bytes:
        """Return the bytes of a stream.

        Raises:
            FormatError: They have another checksum, or the file ends within them.
        """
        data = self._read(*self._spans[name])
        if (found := native.crc32(data)) != checksum:
            raise FormatError(f"stream {name!r} has checksum {found}, expected {checksum}: the file is damaged")
        return data

    def _read(self, start: int, stop: int) -> bytes:
        self._file.seek(self._base + start)
        data = self._file.read(stop - start)
        while len(data) < stop - start:  # unbuffered files return what they have
            if not (more := self._file.read(stop - start - len(data))):
                raise FormatError("the file became shorter while it was read")
            data += more
        return data

    def _header(self) -> dict[str, Any]:
        prefix = self._file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= self.n_bytes - 8:
            kind = next(
                (f": it begins like {what}" for mark, what in LOOKS_LIKE.items() if prefix.startswith(mark)), ""
            )
            raise FormatError(f"this is no .muws file, or one cut short, of {self.n_bytes} bytes{kind}")
        if length > largest_header(self.n_bytes):
            raise FormatError(f"the header has {length} bytes, at most {largest_header(self.n_bytes)} are allowed")
        self._base = 8 + length
        raw = self._file.read(length)
        header = parse(raw, "header")
        if raw.rstrip(b" ") != dump(header):
            raise FormatError("the header is not written as this format writes it")
        return header

    def _check_metadata(self) -> str:
        given = self.metadata
        if not isinstance(given, dict) or given.get("format") != FORMAT:
            raise FormatError("this is no .muws file: its header does not name the format")
        version = str(given.get("version"))
        major, _, minor = version.partition(".")
        if not (major.isascii() and major.isdigit() and minor.isascii() and minor.isdigit()):
            raise FormatError(f"version {version!r} is no version such as {VERSION}")
        if major != VERSION.partition(".")[0]:
            raise FormatError(f"the file has version {version}, this reader knows {NEWEST}: update lightning_muws")
        if version in (VERSION, NEWEST) and set(given) != {"format", "version", "manifest_bytes", "manifest_sha256"}:
            raise FormatError(f"the header has {sorted(given)}, which version {version} does not allow")
        return version

    def _check_streams(self, header: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
        """Return where each stream begins and ends; they follow each other without a gap, to the end of the file."""
        spans, end = {}, 0
        for name, entry in header.items():
            offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
            if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(n) is int for n in offsets):
                raise FormatError(f"stream {name!r} has no valid data_offsets")
            start, stop = offsets
            expected = {"dtype": "U8", "shape": [stop - start], "data_offsets": offsets}
            # neither 5.0 nor true is the number that Python takes them for
            if start != end or stop < start or entry != expected or type(entry["shape"][0]) is not int:
                raise FormatError(
                    f"stream {name!r} should be U8 data at offset {end}, the header has {str(entry)[:100]}"
                )
            spans[name], end = (start, stop), stop
        if self._base + end != self.n_bytes:
            raise FormatError(f"the header declares {self._base + end} bytes, the file has {self.n_bytes}")
        return spans

    def _read_manifest(self) -> dict[str, Any]:
        said = str(self.metadata.get("manifest_bytes"))
        if MANIFEST not in self._spans or not said.isascii() or not said.isdigit() or len(said) > 10:
            raise FormatError("the file has no manifest")
        n, (start, stop) = int(said), self._spans[MANIFEST]
        if (larger := max(n, stop - start)) > (allowed := largest_manifest(self.n_bytes, stop - start)):
            raise FormatError(f"the manifest has {larger} bytes, at most {allowed} are allowed")
        raw = self._read(start, stop)
        if len(raw) != n:
            raw = inflate(raw, n)
        if hashlib.sha256(raw).hexdigest() != self.metadata.get("manifest_sha256"):
            raise FormatError("the manifest has another SHA-256 than the header declares: the file is damaged")
        return parse(raw, "manifest")


def largest_header(n_bytes: int) -> int:
    """Return how many bytes the header of a file of ``n_bytes`` may have: few, so that a small file costs little."""
    return min(MOST, (1 << 19) + n_bytes // 8)


def largest_manifest(n_bytes: int, packed: int) -> int:
    """Return how many bytes a manifest may have whose stream takes ``packed`` of the ``n_bytes`` of a file.

    zlib makes the names and shapes of thousands of small tensors up to 100 times smaller, and a bomb 1000 times.
    """
    return min(MOST, (1 << 19) + n_bytes // 8 + 128 * packed)


def pack_manifest(raw: bytes) -> bytes:
    """Return the fewest bytes from which a reader accepts the manifest, whatever else is in the file."""
    packed = zlib.compress(raw, 9)
    return packed if len(packed) < len(raw) <= largest_manifest(0, len(packed)) else raw


def head(manifest: Mapping[str, Any], lengths: Mapping[str, int]) -> tuple[bytes, bytes]:
    """Return the header of a file, and its manifest as it is stored.

    Args:
        manifest: Its manifest.
        lengths: The bytes of each stream, by name.

    Raises:
        FormatError: The manifest is larger than a reader would accept.
    """
    raw = dump(manifest)
    packed = pack_manifest(raw)
    spans, end = {}, 0
    for name, length in [*lengths.items(), (MANIFEST, len(packed))]:
        spans[name] = {"dtype": "U8", "shape": [length], "data_offsets": [end, end + length]}
        end += length
    about = {
        "format": FORMAT,
        "version": manifest["version"],
        "manifest_bytes": str(len(raw)),
        "manifest_sha256": hashlib.sha256(raw).hexdigest(),
    }
    header = dump({"__metadata__": about, **spans})
    header += b" " * (-len(header) % 8)
    allowed = largest_header(8 + len(header) + end)
    if len(raw) > MOST or len(header) > allowed:
        raise FormatError(
            f"the manifest would have {len(raw)} bytes and the header {len(header)}, at most {MOST} and {allowed} are "
            f"allowed for {len(lengths)} streams: save the model in several files"
        )
    return header, packed


def write(
    path: Path,
    manifest: Mapping[str, Any],
    lengths: Mapping[str, int],
    body: IO[bytes],
    check: Callable[[IO[bytes]], None],
) -> int:
    """Write a file and return how many bytes its header and manifest take.

    Args:
        path: Where the file will be.
        manifest: Its manifest.
        lengths: The bytes of each stream, by name.
        body: The bytes of the streams, in the order of ``lengths``.
        check: Called with the complete file before it replaces an earlier one; raises to prevent that.

    Raises:
        FormatError: The manifest is larger than a reader would accept.
        OSError: The file cannot be written; an earlier file at that place is unchanged.
    """
    header, packed = head(manifest, lengths)
    with replacing(path) as file:
        file.write(struct.pack("<Q", len(header)) + header)
        body.seek(0)
        shutil.copyfileobj(body, file, 1 << 20)
        file.write(packed)
        file.flush()
        check(file)
    return 8 + len(header) + len(packed)


def check_place(path: Path) -> None:
    """Check that a file can be written to a path.

    Raises:
        SettingError: The path is a folder or in none, or what is there is no file, such as a device or a link to
            itself.
    """
    try:
        path.stat()
    except OSError as error:  # others are told by what follows
        if error.errno == errno.ELOOP:
            raise SettingError(f"{path} cannot be written: it is a link to itself: give another name") from None
    if path.is_dir() or not path.parent.is_dir():
        raise SettingError(
            f"{path} cannot be written: it is a folder, or is in none: give a file in a folder that exists"
        )
    if path.exists() and not path.is_file():
        raise SettingError(f"{path} cannot be written: it is a device or a pipe: give the name of a file")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Open a temporary file that replaces ``path`` once it is complete and synced to the disk; removed on an error.

    A link stays, and the file that it leads to is replaced. Temporary files of writers of this path that were killed
    are removed.

    Raises:
        PermissionError: There is a file that nobody may write.
    """
    path = path.resolve()
    if path.exists() and not path.stat().st_mode & 0o222:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
    start = f".muws-{hashlib.sha256(os.fsencode(path.name)).hexdigest()[:16]}-"
    _remove_stale(path.parent, start)
    temporary = path.parent / f"{start}{secrets.token_hex(8)}.tmp"  # as short as that, whatever the name is
    try:
        with temporary.open("x+b") as file:  # with the mode that the umask gives
            _lock(file)
            if path.exists():
                temporary.chmod(stat.S_IMODE(path.stat().st_mode))
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # elsewhere a folder cannot be opened
        folder = os.open(path.parent, os.O_RDONLY)
        with contextlib.suppress(OSError):  # some network file systems cannot; the file is in its place already
            os.fsync(folder)
        os.close(folder)


def _lock(file: IO[bytes]) -> bool:
    """Lock an open file until it is closed; return whether it was free. Where there are no locks, nothing is free."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _remove_stale(folder: Path, start: str) -> None:
    """Remove temporary files whose writer is gone: they are old enough to be locked if it lived, and are not."""
    for path in folder.glob(f"{start}*.tmp"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > STALE_SECONDS:
                with path.open("rb") as file:
                    if _lock(file):
                        path.unlink()
