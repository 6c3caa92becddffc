# SPDX-License-Identifier: Apache-2.0
"""Push and pull against a hub of a few lines on the loopback device."""

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from torchworks_core import hub
from torchworks_core.errors import InvalidValue, MissingExtra, MissingFile

COMMIT = "c0ffee" + "0" * 34
TOKEN = "hf_" + "SeCrEt" * 6

CLIENT = """
import json, logging, sys, traceback
logging.basicConfig(level=logging.DEBUG, stream=sys.stderr)
from torchworks_core import hub
from torchworks_core.errors import TorchworksError

out = []
for name, arguments, options in json.loads(sys.argv[1]):
    try:
        out.append(["ok", str(getattr(hub, name)(*arguments, **options))])
    except TorchworksError as error:
        chain = [error.__cause__, error.__context__]
        text = "".join(traceback.format_exception(error)) + repr(error.args)
        out.append([type(error).__name__, str(error), text, str(chain)])
print(json.dumps(out))
"""


class LoopbackHub:
    """One repository, one revision; it refuses all that names `refuse-<status>`."""

    def __init__(self):
        self.files, self.blobs, self.seen = {}, {}, []
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))
        self.thread.start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def answer(self, method, path, body):
        """Return status, content and headers."""
        refused = re.search("refuse-([0-9]+)", path + body.decode("latin-1"))
        if refused:
            return int(refused[1]), {"error": f"refused {TOKEN}"}, {}
        if path.endswith("/repos/create"):
            return 200, {"url": f"{self.url}/me/{json.loads(body)['name']}"}, {}
        if path.endswith("/validate-yaml"):
            return 200, {"errors": [], "warnings": []}, {}
        if "/preupload/" in path:
            return 200, {"files": [self.mode(f) for f in json.loads(body)["files"]]}, {}
        if path.endswith("/objects/batch"):
            found = [self.upload(o) for o in json.loads(body)["objects"]]
            return 200, {"transfer": "basic", "objects": found}, {}
        if path.startswith("/lfs/"):
            self.blobs[path.removeprefix("/lfs/")] = body
            return 200, {}, {}
        if "/commit/" in path:
            return 200, self.commit(body), {}
        if "/tree/" in path:
            return 200, [self.tree(k, v) for k, v in self.files.items()], {}
        if "/resolve/" in path:
            data = self.files[path.split("/resolve/")[1].split("/", 1)[1]]
            etag = hashlib.sha1(data).hexdigest()
            return 200, data, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT}
        if re.match("/api/models/", path):
            files = [{"rfilename": name} for name in self.files]
            return 200, {"id": "me/model", "sha": COMMIT, "siblings": files}, {}
        return 404, {}, {}

    @staticmethod
    def mode(file):
        large = file["path"].endswith(".safetensors")
        mode = "lfs" if large else "regular"
        return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}

    def upload(self, found):
        action = {"href": f"{self.url}/lfs/{found['oid']}", "header": {}}
        return {**found, "actions": {"upload": action}}

    @staticmethod
    def tree(name, data):
        return {"type": "file", "path": name, "size": len(data), "oid": "b" * 40}

    def commit(self, body):
        for line in map(json.loads, body.decode().splitlines()):
            value = line["value"]
            if line["key"] == "file":
                self.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.files[value["path"]] = self.blobs[value["oid"]]
        url = f"{self.url}/me/model/commit/{COMMIT}"
        return {"success": True, "commitOid": COMMIT, "commitUrl": url}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        """Keep the test's output clean."""

    def handle_any(self):
        body = b"".join(self.chunks())
        path = self.path.split("?")[0]
        authorization = self.headers.get("Authorization")
        self.hub.seen.append((self.command, path, authorization))
        status, content, headers = self.hub.answer(self.command, path, body)
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def chunks(self):
        if self.headers.get("Transfer-Encoding") != "chunked":
            yield self.rfile.read(int(self.headers.get("Content-Length", 0)))
            return
        while size := int(self.rfile.readline(), 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()

    do_GET = do_POST = do_PUT = do_HEAD = handle_any


@pytest.fixture
def server():
    server = LoopbackHub()
    yield server
    server.close()


@pytest.fixture
def client(tmp_path):
    """Run calls in a fresh process: the hub's client reads HF_* at import."""

    def run(endpoint, *calls, **settings):
        settings = {
            "HF_ENDPOINT": endpoint,
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            **settings,
        }
        env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
        done = subprocess.run(
            [sys.executable, "-c", CLIENT, json.dumps(calls)],
            env=env | settings,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert TOKEN not in done.stdout + done.stderr
        return json.loads(done.stdout)

    return run


def folder_of_a_model(path):
    path.mkdir()
    (path / "config.json").write_text("{}")
    (path / "model.safetensors").write_bytes(b"\2\0\0\0\0\0\0\0{}")
    return path


def test_push_and_pull(tmp_path, server, client):
    folder = folder_of_a_model(tmp_path / "model")
    options = {"token": TOKEN, "private": True, "commit_message": "first"}
    pushed, pulled, part = client(
        server.url,
        ["push_folder", [str(folder), "me/model"], options],
        ["pull_folder", ["me/model"], {"token": TOKEN}],
        ["pull_folder", ["me/model"], {"allow_patterns": "*.json"}],
    )
    assert pushed == ["ok", f"{server.url}/me/model/commit/{COMMIT}"]
    assert pulled[0] == part[0] == "ok"
    for name in ("config.json", "model.safetensors"):
        with open(os.path.join(pulled[1], name), "rb") as file:
            assert file.read() == (folder / name).read_bytes()
    create = next(seen for seen in server.seen if seen[1].endswith("/repos/create"))
    assert create[2] == f"Bearer {TOKEN}"
    server.seen.clear()
    (again,) = client(server.url, ["pull_folder", ["me/model"], {}], HF_HUB_OFFLINE="1")
    assert again == pulled
    assert server.seen == []


@pytest.mark.critical
def test_refusal_is_one_clear_error_without_the_token(tmp_path, server, client):
    folder = folder_of_a_model(tmp_path / "model")
    statuses = [401, 403, 404, 418, 500]
    calls = []
    for status in statuses:
        name = f"me/refuse-{status}"
        calls.append(["push_folder", [str(folder), name], {"token": TOKEN}])
        calls.append(["pull_folder", [name], {"token": TOKEN}])
    found = client(server.url, *calls)
    for status, (kind, message, *rest) in zip(
        [status for status in statuses for _ in range(2)], found, strict=True
    ):
        assert kind == "NotReady"
        assert f"'me/refuse-{status}'" in message
        assert f"answered {status} " in message
        assert TOKEN not in message + "".join(rest)
        assert rest[-1] == "[None, None]"


@pytest.mark.parametrize("offline", ["0", "1"])
def test_no_network(tmp_path, client, offline):
    folder = folder_of_a_model(tmp_path / "model")
    found = client(
        "http://127.0.0.1:9",
        ["push_folder", [str(folder), "me/model"], {"token": TOKEN}],
        ["pull_folder", ["me/model"], {"token": TOKEN}],
        HF_HUB_OFFLINE=offline,
    )
    for kind, message, *_ in found:
        assert kind == "NotReady"
        assert "can't be reached" in message


@pytest.mark.parametrize(
    "repo_id",
    [
        "",
        "/",
        "a/b/c",
        "a b",
        "../x",
        "a/..",
        "a--b",
        "-a",
        "a.",
        "me/x.git",
        None,
        "https://example.org/me/x",
        "a/" + "x" * 97,
        "mé/x",
        "a\n",
        "me/",
    ],
)
def test_repo_id_is_checked_before_any_request(tmp_path, monkeypatch, repo_id):
    monkeypatch.setattr(hub, "_call", pytest.fail)
    with pytest.raises(InvalidValue, match="repo_id"):
        hub.push_folder(tmp_path, repo_id)
    with pytest.raises(InvalidValue, match="repo_id"):
        hub.pull_folder(repo_id)


@pytest.mark.parametrize("repo_id", ["gpt2", "me/x", "m-e/x_1.0-b", "a/" + "x" * 96])
def test_usual_repo_ids_pass(monkeypatch, repo_id):
    monkeypatch.setattr(hub, "_call", lambda *_: "done")
    assert hub.pull_folder(repo_id) == Path("done")


def test_missing_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "_call", pytest.fail)
    with pytest.raises(MissingFile, match="none"):
        hub.push_folder(tmp_path / "none", "me/x")


def test_missing_client(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingExtra, match=r"torchworks-core\[hub\]"):
        hub.pull_folder("me/x")


def test_other_errors_are_told_without_the_token():
    error = hub._explain(KeyError(f"{TOKEN} and mine"), "push", ["mine", None])
    assert "KeyError" in str(error)
    assert TOKEN not in str(error)
    assert "mine" not in str(error)
