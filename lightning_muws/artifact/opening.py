"""Opens what a `.muws` file is read from: a path, an open file, or a URL through fsspec."""

from __future__ import annotations

import contextlib
import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from lightning_muws.errors import SettingError

Readable = str | Path | IO[bytes]  # a path, a URL such as https://... or s3://..., or a seekable file open for reading
URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+(::|://)")  # fsspec's chains too; one letter is a Windows drive


def is_url(source: object) -> bool:
    """Return whether a source is a URL that fsspec opens.

    Example:
        >>> is_url("https://example.org/model.muws"), is_url("C:/model.muws")
        (True, False)
    """
    return isinstance(source, str) and URL.match(source) is not None


def name_of(source: Readable) -> str:
    """Return what messages call a source."""
    if isinstance(source, (str, Path)):
        return str(source)
    return str(getattr(source, "name", "") or f"the open {type(source).__name__}")


@contextlib.contextmanager
def opened_bytes(source: Readable) -> Iterator[IO[bytes]]:
    """Open a source for reading in any order; a file that was open before stays open.

    Of a URL only the bytes that are asked for are requested, without reading ahead.

    Raises:
        SettingError: The file cannot seek or is a text file, the server of the URL does not send parts of a file, or
            fsspec is not installed.
        OSError: There is no such file.
    """
    if isinstance(source, (str, Path)) and not is_url(source):
        with Path(source).open("rb") as file:
            yield file
    elif isinstance(source, (str, Path)):
        with _remote(str(source)) as file:
            yield file
    elif not callable(getattr(source, "read", None)):
        raise SettingError(
            f"{source!r:.100} is no source of a .muws file: give a path, a URL, or a file open for reading"
        )
    elif not source.seekable() or not isinstance(source.read(0), bytes):
        raise SettingError(
            f"{name_of(source)} cannot be read in parts: give a file that can seek, opened with mode 'rb', "
            "or io.BytesIO of its bytes"
        )
    else:
        yield source


def _remote(url: str) -> Any:
    """Return the open file of a URL."""
    try:
        fsspec = importlib.import_module("fsspec.core")
        system, path = fsspec.url_to_fs(url)
    except ImportError as error:
        raise SettingError(f"{url} needs lightning-muws[remote], which is not installed: {error}") from error
    except ValueError as error:  # an unknown protocol
        raise SettingError(f"{url} cannot be opened: {error}") from None
    file = system.open(path, "rb", cache_type="none")
    if getattr(file, "size", None) is None:
        file.close()
        raise SettingError(f"{url}: the server does not send parts of a file: download the file, and give its path")
    return file
