"""Downloads by the real package huggingface_hub, from a hub of our own: once, into the cache."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from helpers.command import environment

pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "config.json": b'{"model_type": "esm"}',
    "pytorch_model.bin": b"PK and more",
    "README.md": b"read me",
}
FETCH = """
import sys
from dist_esm.config import model_config
from dist_esm.model.checkpoints.locate import fetch, resolve
config = model_config("auto")
config.weights = sys.argv[1]
try:
    fetch(config)
    print(*sorted(path.name for path in resolve(config.weights).iterdir()))
except ValueError as error:
    print(error)
"""


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's API as a snapshot needs."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        parts = self.path.partition("?")[0].strip("/").split("/")
        if parts[:4] == ["api", "models", "some", "esm2"]:
            siblings = [{"rfilename": name} for name in FILES]
            tree = [
                {"type": "file", "path": name, "size": len(content), "oid": f"oid-{name}"}
                for name, content in FILES.items()
            ]
            answer = tree if "tree" in parts else {"id": "some/esm2", "sha": COMMIT, "siblings": siblings}
            self.answer(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})
        elif parts[:3] == ["some", "esm2", "resolve"] and parts[-1] in FILES:
            headers = {"ETag": f'"etag-{parts[-1]}"', "X-Repo-Commit": COMMIT}
            self.answer(200, FILES[parts[-1]], headers)
        else:
            self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})

    def answer(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.asked = []
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def fetch(server: ThreadingHTTPServer, home: Path, model_id: str, **extra: str) -> str:
    ours = {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    names = environment(**{**ours, **extra})
    names.pop("HF_HUB_CACHE", None)
    line = [sys.executable, "-c", FETCH, model_id]
    result = subprocess.run(line, capture_output=True, text=True, timeout=120, env=names, check=True)
    return result.stdout.strip()


def test_a_model_is_downloaded_once_without_what_is_not_needed(hub, tmp_path):
    assert fetch(hub, tmp_path, "some/esm2") == "config.json pytorch_model.bin"
    folder = tmp_path / "hub" / "models--some--esm2" / "snapshots" / COMMIT
    assert (folder / "pytorch_model.bin").read_bytes() == FILES["pytorch_model.bin"]
    asked = len(hub.asked)
    assert asked > 0
    assert fetch(hub, tmp_path, "some/esm2") == "config.json pytorch_model.bin"
    assert len(hub.asked) == asked, "what is in the cache is not asked for again"


def test_a_model_that_the_hub_does_not_have_is_named(hub, tmp_path):
    message = fetch(hub, tmp_path, "other/esm2")
    assert "other/esm2 is neither a file or directory nor in the Hugging Face cache" in message
    assert "cannot be downloaded" in message
    assert "\n" not in message


def test_offline_the_hub_is_not_asked(hub, tmp_path):
    message = fetch(hub, tmp_path, "some/esm2", HF_HUB_OFFLINE="1")
    assert "HF_HUB_OFFLINE forbids to download it" in message
    assert hub.asked == []


def test_without_internet_one_line_says_so(hub, tmp_path):
    message = fetch(hub, tmp_path, "some/esm2", HF_ENDPOINT="http://127.0.0.1:9")
    assert "some/esm2 is neither a file or directory nor in the Hugging Face cache" in message
    assert "cannot be downloaded" in message
    assert "\n" not in message
