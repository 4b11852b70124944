"""As much of the Hugging Face hub's HTTP API as it takes to put a model there and to get it back, on this machine."""

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub(BaseHTTPRequestHandler):
    """Keeps what is sent in ``repositories``: by name, files by path."""

    repositories: dict[str, dict[str, bytes]]

    def log_message(self, *args: Any) -> None:
        """Nothing on stderr."""

    def _answer(self, value: Any, status: int = 200, **headers: str) -> None:
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self) -> None:
        """Make a repository, or add files to it."""
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        parts = self.path.strip("/").split("/")
        if parts == ["api", "repos", "create"]:
            request = json.loads(body)
            name = f"{request.get('organization', 'user')}/{request['name']}"
            self.repositories.setdefault(name, {})
            self._answer(dict(url=f"http://{self.headers['Host']}/{name}"))
        elif parts[-2:-1] == ["preupload"]:
            files = [dict(path=file["path"], uploadMode="regular", shouldIgnore=False) for file in json.loads(body)["files"]]
            self._answer(dict(files=files))
        elif parts[-2:-1] == ["commit"]:
            name = "/".join(parts[2:4])
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.repositories[name][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            address = f"http://{self.headers['Host']}/{name}/commit/{COMMIT}"
            self._answer(dict(success=True, commitUrl=address, commitOid=COMMIT))
        else:
            self._answer({}, 200)  # whether the card's YAML is valid

    def do_GET(self) -> None:
        """What there is, or a file."""
        parts = self.path.split("?")[0].strip("/").split("/")
        name = "/".join(parts[2:4] if parts[0] == "api" else parts[:2])
        files = self.repositories.get(name)
        if files is None:
            self._answer(dict(error="Repository not found"), 404, X_Error_Code="RepoNotFound")
        elif "tree" in parts:
            self._answer([dict(type="file", path=path, size=len(files[path]), oid=_digest(files[path])) for path in files])
        elif parts[0] == "api":
            siblings = [dict(rfilename=path, size=len(content)) for path, content in files.items()]
            self._answer(dict(id=name, sha=COMMIT, siblings=siblings, private=False, tags=[], downloads=0))
        else:
            content = files["/".join(parts[4:])]
            self._answer(content, ETag=f'"{_digest(content)}"', X_Repo_Commit=COMMIT)

    do_HEAD = do_GET


def _digest(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


@contextmanager
def fake_hub() -> Iterator[tuple[str, dict[str, dict[str, bytes]]]]:
    """The address of a hub on this machine, and its repositories."""
    handler = type("Handler", (FakeHub,), dict(repositories={}))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", handler.repositories  # type: ignore[attr-defined]
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
