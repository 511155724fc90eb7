"""A Hub of models on 127.0.0.1 that holds files in memory: what huggingface_hub needs to push and to pull."""

import base64
import contextlib
import hashlib
import http.server
import json
import re
import threading
from collections.abc import Iterator

SHA = "0123456789abcdef0123456789abcdef01234567"


class Hub(http.server.BaseHTTPRequestHandler):
    """Serves ``files`` as one repository, whatever its name."""

    files: dict[str, bytes]
    asked: list[str]

    def _answer(self, body: bytes, **headers: str) -> None:
        self.send_response(200)
        for name, value in {"Content-Length": str(len(body)), "X-Repo-Commit": SHA, **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, value: object) -> None:
        self._answer(json.dumps(value).encode(), **{"Content-Type": "application/json"})

    def do_GET(self) -> None:
        self.asked.append(f"{self.command} {self.path}")
        if found := re.fullmatch(r"/[^/]+/[^/]+/resolve/[^/]+/(.+)", self.path.partition("?")[0]):
            data = self.files.get(found[1])
            if data is None:
                self.send_response(404)
                self.send_header("X-Error-Code", "EntryNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()
            else:
                self._answer(data, ETag=f'"{hashlib.sha256(data).hexdigest()}"')
        elif "/tree/" in self.path:
            self._json(
                [
                    {"type": "file", "path": name, "size": len(x), "oid": hashlib.sha1(x).hexdigest()}  # noqa: S324
                    for name, x in self.files.items()
                ]
            )
        else:
            about = {"id": "some/model", "modelId": "some/model", "sha": SHA, "private": False, "tags": []}
            self._json({**about, "siblings": [{"rfilename": name} for name in self.files]})

    do_HEAD = do_GET  # noqa: N815  the name that the server looks for

    def do_POST(self) -> None:
        self.asked.append(f"POST {self.path}")
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            self._json(
                {"files": [{"path": n, "uploadMode": "regular", "shouldIgnore": False, "oid": None} for n in names]}
            )
        elif "/commit/" in self.path:
            for line in body.decode().splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    self.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            self._json({"commitUrl": f"http://{self.headers['Host']}/some/model/commit/{SHA}", "commitOid": SHA})
        elif self.path.endswith("/repos/create"):
            self._json({"url": f"http://{self.headers['Host']}/some/model", "name": "some/model"})
        else:
            self._json({"warnings": [], "errors": []})

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def fake_hub() -> Iterator[tuple[str, type[Hub]]]:
    """Run a Hub without files; yield its URL, and its class, which has what it holds."""

    class Here(Hub):
        files: dict[str, bytes] = {}  # noqa: RUF012  of this class alone
        asked: list[str] = []  # noqa: RUF012

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Here) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{running.server_port}", Here
        finally:
            running.shutdown()
            thread.join()
