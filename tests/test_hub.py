"""`lmim export --push` against a stand-in for the Hugging Face Hub on this machine."""

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading

import conftest
import pytest
import tiny

from lmim_jax.convert import hub
from lmim_jax.utils.errors import UserError

pytestmark = pytest.mark.interop
constants = pytest.importorskip("huggingface_hub.constants", reason="pip install 'lmim_jax[hub]'")
TOKEN = "hf_" + "x" * 34
REPO = "somebody/some-model"


class StandIn(http.server.ThreadingHTTPServer):
    """The endpoints of the Hub that an upload uses; it checks what real ones check."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        self.repos = {}  # name -> private
        self.stored = {}  # SHA-256 -> bytes
        self.commits = []  # {path: bytes}
        self.refuse = {}  # start of a path -> status

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *error):
        self.shutdown()
        self.server_close()


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *arguments):
        pass

    def body(self):
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def answer(self, content, status=200):
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def refused(self):
        """Answer what has no valid token, and what the test refuses."""
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.answer({"error": "Invalid username or password."}, 401)
            return True
        for start, status in self.server.refuse.items():
            if self.path.startswith(start):
                self.answer({"error": "You don't have the rights"}, status)
                return True
        return False

    def do_GET(self):
        if self.refused():
            return
        repo = self.path.removeprefix("/api/models/")
        if repo not in self.server.repos:
            self.answer({"error": "Repository not found"}, 404)
            return
        self.answer({"id": repo, "modelId": repo, "private": self.server.repos[repo], "tags": []})

    def do_PUT(self):
        content = self.body()
        assert hashlib.sha256(content).hexdigest() == self.path.rpartition("/")[2]
        self.server.stored[hashlib.sha256(content).hexdigest()] = content
        self.answer({})

    def do_POST(self):
        content = self.body()
        if self.refused():
            return
        server = self.server
        if self.path == "/api/repos/create":
            asked = json.loads(content)
            repo = f"{asked['organization']}/{asked['name']}" if "organization" in asked else REPO
            status = 409 if repo in server.repos else 200
            private = asked.get("private") or asked.get("visibility") == "private"
            server.repos.setdefault(repo, bool(private))
            self.answer({"url": f"{server.endpoint}/{repo}", "error": "exists"}, status)
        elif self.path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif self.path == f"/api/models/{REPO}/preupload/main":
            files = []
            for file in json.loads(content)["files"]:
                mode = "lfs" if file["path"].endswith((".safetensors", ".onnx")) else "regular"
                files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False})
            self.answer({"files": files})
        elif self.path == f"/{REPO}.git/info/lfs/objects/batch":
            objects = []
            for asked in json.loads(content)["objects"]:
                upload = {"href": f"{server.endpoint}/lfs/{asked['oid']}"}
                objects.append({**asked, "actions": {"upload": upload}})
            self.answer({"transfer": "basic", "objects": objects})
        elif self.path == f"/api/models/{REPO}/commit/main":
            self.commit([json.loads(line) for line in content.splitlines()])
        else:
            self.answer({"error": f"not in this stand-in: {self.path}"}, 404)

    def commit(self, operations):
        import base64

        files = {}
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                files[value["path"]] = self.server.stored[value["oid"]]
        self.server.commits.append(files)
        url = f"{self.server.endpoint}/{REPO}/commit/abc"
        self.answer({"success": True, "commitOid": "abc", "commitUrl": url, "hookOutput": ""})


@pytest.fixture
def server(monkeypatch, tmp_path):
    with StandIn() as standing:
        monkeypatch.setattr(constants, "ENDPOINT", standing.endpoint)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "absent"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield standing


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "README.md").write_text("---\nlicense: other\n---\n# a model\n")
    (folder / "config.json").write_text("{}\n")
    (folder / "model.safetensors").write_bytes(os.urandom(3000))
    return folder


@pytest.mark.parametrize("private", [False, True])
def test_all_files_are_one_commit(server, folder, private):
    hub.check(REPO)
    assert hub.push(folder, REPO, private, "a message").endswith(REPO)
    hub.push(folder, REPO, private, "again")
    assert server.repos == {REPO: private}
    expected = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert server.commits == [expected, expected]


def test_private_weights_never_go_into_a_public_repository(server, folder):
    server.repos[REPO] = False
    with pytest.raises(UserError, match="exists and is public"):
        hub.push(folder, REPO, True, "a message")
    assert not server.commits and not server.stored


@pytest.mark.parametrize(
    ("start", "status", "message"),
    [
        ("/api/repos/create", 403, "may not write there .*rights.*role `write`"),
        ("/api/repos/create", 401, "does not accept the token"),
        (f"/api/models/{REPO}/commit", 403, "may not write there"),
        (f"/api/models/{REPO}/preupload", 404, "answered 404"),
    ],
)
def test_refusals_are_one_line_and_say_how_to_go_on(server, folder, start, status, message):
    server.refuse[start] = status
    with pytest.raises(UserError, match=message) as error:
        hub.push(folder, REPO, False, "a message")
    assert f"hf upload {REPO} {folder}" in str(error.value)
    assert not server.commits


def test_a_hub_that_is_away_is_named(folder, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(UserError, match="cannot be reached"):
        hub.push(folder, REPO, False, "a message")


@pytest.mark.parametrize(
    ("repo", "token", "message"),
    [
        ("model", TOKEN, "must be USER/NAME"),
        ("a/b/c", TOKEN, "must be USER/NAME"),
        ("some body/model", TOKEN, "must be USER/NAME"),
        ("somebody/-model", TOKEN, "must be USER/NAME"),
        (REPO, "", "there is no token.*hf auth login"),
    ],
)
def test_mistakes_are_found_without_the_network(server, monkeypatch, repo, token, message):
    monkeypatch.setenv("HF_TOKEN", token)
    server.endpoint = ""
    with pytest.raises(UserError, match=message):
        hub.check(repo)


def test_the_command(server, tmp_path):
    """A real process; a folder that fails the check of its flags is not written, nor pushed."""
    run = tiny.run(tiny.get_config(), tmp_path / "run")

    def lmim(*words, **changes):
        environment = {**os.environ, "XLA_FLAGS": "", "HF_ENDPOINT": server.endpoint}
        environment |= {"HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "home"), **changes}
        done = subprocess.run(
            [sys.executable, "-m", "lmim_jax.cli", "export", str(run), *words],
            cwd=conftest.ROOT,
            env=environment,
            capture_output=True,
            text=True,
        )
        return done.returncode, done.stdout, done.stderr.strip().splitlines()

    words = ["--format=hf", f"--out={tmp_path / 'out'}", f"--push={REPO}"]
    code, _, errors = lmim(*words, HF_TOKEN="")
    assert code == 2 and "there is no token" in errors[-1] and not (tmp_path / "out").exists()
    code, output, errors = lmim(*words, "--private")
    assert code == 0, errors
    assert f"pushed to {server.endpoint}/{REPO}" in output
    assert server.repos == {REPO: True}
    (files,) = server.commits
    names = {"README.md", "config.json", "preprocessor_config.json", "model.safetensors"}
    assert files.keys() == names
    assert f'AutoModel.from_pretrained("{REPO}"' in files["README.md"].decode()
    code, _, errors = lmim("--format=hf", f"--out={tmp_path / 'two'}", "--private")
    assert code == 2 and "--private goes with --push" in errors[-1]
    options = ("--format=safetensors", f"--out={tmp_path / 'three'}", "--modalities=thermal")
    code, _, errors = lmim(*options)
    assert code == 2 and "leave out --modalities" in errors[-1]
