"""`muws view`: serves the viewer and one `.muws` file to a browser on this machine."""

from __future__ import annotations

import argparse
import secrets
import shutil
import webbrowser
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote

from lightning_muws.artifact.load import inspect_compressed
from lightning_muws.commands.options import opened
from lightning_muws.commands.output import DONE, say, say_json
from lightning_muws.errors import SettingError

FOLDER = Path(__file__).parents[1] / "viewer"
ADDRESS = "127.0.0.1"  # other machines cannot reach it
TYPES = {
    "index.html": "text/html; charset=utf-8",
    "style.css": "text/css; charset=utf-8",
    "page.js": "text/javascript; charset=utf-8",
    "worker.js": "text/javascript; charset=utf-8",
    "muws.js": "text/javascript; charset=utf-8",
}


def add_parsers(command: Callable[..., argparse.ArgumentParser]) -> None:
    """Add ``view``; ``command`` adds a subcommand and returns its parser."""
    parser = command("view", view, "show a .muws file in the browser: its tensors and pictures of their blocks")
    parser.add_argument("file", type=Path, help="the .muws file; - for standard input")
    parser.add_argument("--port", type=int, default=0, help="port on this machine (default: a free one)")
    parser.add_argument("--no-browser", action="store_true", help="print the address and open no browser")


def view(options: argparse.Namespace) -> int:
    """Serve the viewer until it is interrupted, and return the exit code, 0.

    Raises:
        SettingError: The port cannot be used.
        FormatError: The file is no `.muws` file, or its manifest is damaged.
    """
    with opened(options.file) as path:
        inspect_compressed(path)
        name = "standard input.muws" if str(options.file) == "-" else options.file.name
        with Server(path, options.port) as server:
            url = f"{server.url}#{quote(name)}"
            say_json({"url": url}) if options.json else say(f"{url}\npress Ctrl-C to end")
            if not options.no_browser:
                webbrowser.open(url)
            try:
                server.serve_forever()
            except KeyboardInterrupt:
                say("")
    return DONE


class Server(ThreadingHTTPServer):
    """Serves the viewer and one file, under an address that only its user knows.

    Another page in the same browser can send requests to this machine. It cannot guess the address, and a request that
    does not name this machine as its host is refused, as a foreign name may lead here too (DNS rebinding).

    Args:
        path: The file.
        port: A port of this machine; 0 for a free one.

    Raises:
        SettingError: The port cannot be used.
    """

    daemon_threads = True

    def __init__(self, path: Path, port: int = 0) -> None:
        self.path, self.secret = path, secrets.token_urlsafe(16)
        try:
            super().__init__((ADDRESS, port), _Handler)
        except (OSError, OverflowError) as error:
            raise SettingError(f"port {port} cannot be used ({error}): give another --port, or none") from None

    @property
    def url(self) -> str:
        """The address of the page."""
        return f"http://{ADDRESS}:{self.server_port}/{self.secret}/"


class _Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """Send a file of the viewer, or the file that is shown."""
        allowed = {f"{name}:{self.server.server_port}" for name in (ADDRESS, "localhost")}
        folder, _, name = self.path.partition("?")[0].removeprefix("/").partition("/")
        name = name or "index.html"
        if self.headers.get("Host") not in allowed:
            self._send_error(HTTPStatus.FORBIDDEN)
        elif not secrets.compare_digest(folder.encode(), self.server.secret.encode()):
            self._send_error(HTTPStatus.NOT_FOUND)
        elif name == "file":
            self._send(self.server.path, "application/octet-stream")
        elif name in TYPES:
            self._send(FOLDER / name, TYPES[name])
        else:
            self._send_error(HTTPStatus.NOT_FOUND)

    def _send(self, path: Path, kind: str) -> None:
        try:
            file = path.open("rb")
        except OSError:
            self._send_error(HTTPStatus.NOT_FOUND)
            return
        with file:
            self.send_response(HTTPStatus.OK)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(path.stat().st_size))
            self._send_policy()
            shutil.copyfileobj(file, self.wfile)

    def _send_error(self, status: HTTPStatus) -> None:
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self._send_policy()

    def _send_policy(self) -> None:
        for name, value in (
            ("Cache-Control", "no-store"),
            ("Cross-Origin-Resource-Policy", "same-origin"),
            ("Referrer-Policy", "no-referrer"),
            ("X-Content-Type-Options", "nosniff"),
        ):
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        """Say nothing for each request."""
