"""Drives a real headless Chromium over its DevTools pipe, with nothing but Python's standard library."""

import base64
import contextlib
import itertools
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = [
    "--headless=new", "--remote-debugging-pipe", "--no-sandbox", "--disable-gpu", "--no-first-run", "--mute-audio",
    "--disable-extensions", "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-dev-shm-usage", "--force-color-profile=srgb", "--hide-scrollbars",
]  # fmt: skip
PATIENCE = 60.0  # seconds until a call of a busy machine has failed


def program() -> str:
    """Return the path of Chromium, or skip the test."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if os.name != "posix" or found is None:
        pytest.skip(f"no Chromium is installed ({', '.join(NAMES)}), such as the package chromium of Debian")
    return found


class Browser:
    """A browser with one page.

    Attributes:
        requests: The address of each request that the page made.
        errors: The messages of errors in the console, and of exceptions that nothing caught.
    """

    def __init__(self, to: int, back: int) -> None:
        self._to, self._back, self._buffer, self._ids = to, back, b"", itertools.count(1)
        self._session: str | None = None
        self.requests: list[str] = []
        self.errors: list[str] = []
        target = self.call("Target.createTarget", url="about:blank", newWindow=True, width=1200, height=900)["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "DOM", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> Any:
        """Call a method of the DevTools protocol and return its result."""
        number = next(self._ids)
        message = {"id": number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            found = self._read()
            if found.get("id") == number:
                assert "error" not in found, f"{method}: {found['error']}"
                return found["result"]

    def _read(self, patience: float = PATIENCE) -> dict[str, Any]:
        deadline = time.monotonic() + patience
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._back], [], [], max(0, deadline - time.monotonic()))
            assert ready, "the browser does not answer"
            data = os.read(self._back, 1 << 20)
            assert data, "the browser has ended"
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\0")
        message = json.loads(line)
        params = message.get("params", {})
        match message.get("method"):
            case "Network.requestWillBeSent":
                self.requests.append(params["request"]["url"])
            case "Runtime.exceptionThrown":
                details = params["exceptionDetails"]
                self.errors.append(str(details.get("exception", {}).get("description") or details["text"]))
            case "Log.entryAdded" if params["entry"]["level"] == "error":
                self.errors.append(params["entry"]["text"])
        return message

    def open(self, url: str) -> None:
        """Open an address and wait until its page is loaded."""
        self.requests.clear()
        self.errors.clear()
        self.call("Page.navigate", url=url)
        self.wait("document.readyState === 'complete' && location.href !== 'about:blank'")

    def evaluate(self, script: str) -> Any:
        """Return the value of an expression of JavaScript, after it is awaited."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def wait(self, script: str, patience: float = PATIENCE) -> Any:
        """Return the first true value of an expression."""
        deadline = time.monotonic() + patience
        while not (found := self.evaluate(script)):
            assert time.monotonic() < deadline, f"{script} stayed {found!r}; {self.errors}"
            time.sleep(0.02)
        return found

    def choose(self, selector: str, *files: Path) -> None:
        """Choose files in an ``<input type=file>``."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(file) for file in files])

    def drop(self, file: Path, x: int = 300, y: int = 150) -> None:
        """Drop a file on a place of the page, as from a file manager."""
        data = {"items": [], "files": [str(file)], "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "drop"):
            self.call("Input.dispatchDragEvent", type=kind, x=x, y=y, data=data)

    def screenshot(self, path: Path) -> None:
        """Write a picture of the whole page as PNG."""
        found = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(found["data"]))


@contextlib.contextmanager
def browser() -> Iterator[Browser]:
    """Start a browser, and end it; skip the test where none is installed."""
    name = program()
    with tempfile.TemporaryDirectory(prefix="muws-browser-", ignore_cleanup_errors=True) as folder:
        from_us, to = os.pipe()
        back, to_us = os.pipe()
        command = [
            "bash",
            "-c",
            f'exec "$@" 3<&{from_us} 4>&{to_us}',
            "bash",
            name,
            *FLAGS,
            f"--user-data-dir={folder}",
        ]
        process = subprocess.Popen(  # noqa: S603  our own words
            command, pass_fds=(from_us, to_us), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(from_us)
        os.close(to_us)
        try:
            found = Browser(to, back)
            yield found
            found._session = None
            found.call("Browser.close")
        finally:
            os.close(to)
            os.close(back)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
