"""Uploading a model: what is checked and listed, and what a hub on this machine receives."""

import base64
import json
import pickle
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub.constants
import pytest
import torch
from surgery_fixtures import llama

from elo.cli import main
from elo.errors import EloError
from elo.push import push

TOKEN = "hf_" + "abcDEF1234" * 4
CARD = "---\nlicense: mit\n---\n\n# Model\n"


@pytest.fixture
def model(tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)  # the other tests are offline
    llama().save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "README.md").write_text(CARD)
    (tmp_path / "model" / ".cache").write_text(TOKEN)
    (tmp_path / "model" / "notes").mkdir()
    (tmp_path / "model" / "notes" / "a.txt").write_text("a")
    return tmp_path / "model"


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as an upload of small files asks for."""

    def do_GET(self):
        self.answer({"id": "me/model", "private": self.server.private, "sha": "0" * 40, "siblings": []})

    def do_POST(self):
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.requests.append((self.path, dict(self.headers), body))
        if self.server.status != 200:
            self.answer({"error": f"no, {self.headers['Authorization']}"}, self.server.status)
        elif self.path == "/api/repos/create":
            self.answer({"url": f"{self.server.endpoint}/me/model", "id": "me/model"})
        elif self.path == "/api/validate-yaml":
            errors = [{"message": "license: wrong"}] if "wrong" in json.loads(body)["content"] else []
            self.answer({"errors": errors, "warnings": []}, 400 if errors else 200)
        elif "/preupload/" in self.path:
            names = [each["path"] for each in json.loads(body)["files"]]
            self.answer({"files": [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]})
        else:
            self.answer(
                {"success": True, "commitUrl": f"{self.server.endpoint}/me/model/commit/1", "commitOid": "1" * 40}
            )

    def answer(self, value, status=200):
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def hub(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.requests, server.status, server.private = [], 200, False
    server.endpoint = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.endpoint)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield server
    server.shutdown()
    server.server_close()


def test_a_dry_run_lists_every_file_with_its_size(model, capsys):
    main(["push", str(model), "--repo", "me/model", "--dry-run"])
    said = capsys.readouterr().out
    expected = {"README.md", "config.json", "generation_config.json", "model.safetensors", "notes/a.txt"}
    listed = {line.split()[-1]: line for line in said.splitlines() if line.startswith(" ")}
    assert set(listed) == expected, "hidden files are left out"
    assert listed["notes/a.txt"].split()[:2] == ["1", "B"]
    assert "5 files" in said
    assert "would be uploaded to me/model" in said


def test_the_hub_receives_these_files_in_one_commit(model, hub, capsys):
    main(["push", str(model), "--repo", "me/model"])
    said = capsys.readouterr()
    assert f"{hub.endpoint}/me/model/commit/1" in said.out
    assert TOKEN not in said.out + said.err
    commits = [body for path, _, body in hub.requests if "/commit/" in path]
    assert len(commits) == 1
    files = {}
    for line in commits[0].splitlines():
        entry = json.loads(line)
        if entry["key"] == "file":
            files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
    assert files == {
        path.relative_to(model).as_posix(): path.read_bytes()
        for path in model.rglob("*")
        if path.is_file() and path.name != ".cache"
    }
    assert all(headers.get("authorization") == f"Bearer {TOKEN}" for _, headers, _ in hub.requests)


def test_a_public_repository_gets_no_private_model(model, hub):
    with pytest.raises(EloError, match="exists and is public"):
        push(model, "me/model", private=True)
    assert not [path for path, _, _ in hub.requests if "/commit/" in path]
    hub.private = True
    push(model, "me/model", private=True)
    created = json.loads(next(body for path, _, body in hub.requests if path == "/api/repos/create"))
    assert created.get("private") is True or created.get("visibility") == "private"


@pytest.mark.parametrize(
    ("status", "said"),
    [(401, "token is not valid"), (403, "may not write there"), (404, "no such owner"), (418, "418")],
)
def test_what_the_hub_refuses_is_one_message_without_the_token(status, said, model, hub, capsys):
    hub.status = status
    with pytest.raises(SystemExit):
        main(["push", str(model), "--repo", "me/model"])
    printed = capsys.readouterr()
    assert said in printed.err
    assert printed.err.count("\n") == 1
    assert TOKEN not in printed.out + printed.err


def test_metadata_that_the_hub_refuses(model, hub):
    (model / "README.md").write_text(CARD.replace("mit", "wrong"))
    with pytest.raises(EloError, match="license: wrong"):
        push(model, "me/model")


def test_no_token_and_no_network(model, monkeypatch):
    with pytest.raises(EloError, match="set HF_TOKEN"):
        push(model, "me/model")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(EloError, match=r"127\.0\.0\.1:9: cannot be reached") as raised:
        push(model, "me/model")
    assert TOKEN not in str(raised.value)


@pytest.mark.parametrize(("repo", "said"), [("model", "has no owner"), ("a/b/c", "write owner/name"), ("a b/c", "own")])
def test_wrong_names(repo, said, model):
    with pytest.raises(EloError, match=said):
        push(model, repo, dry_run=True)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("pytorch_model.bin", b"", "is a pickle"),
        ("state", pickle.dumps({}), "is a pickle"),
        ("notes/README.md", f"x\n\ntoken: {TOKEN}".encode(), "README.md:3: looks like a Hugging Face token"),
        ("deploy.txt", b"-----BEGIN RSA PRIVATE KEY-----", "private key"),
        ("run.yaml", b"key: sk-" + b"a1B2" * 10, "looks like an API key"),
        ("server.pem", b"", "has the name of a file with a key"),
    ],
)
def test_pickles_and_secrets_are_refused(name, content, said, model):
    (model / name).write_bytes(content)
    with pytest.raises(EloError, match=said) as raised:
        push(model, "me/model", dry_run=True)
    assert TOKEN not in str(raised.value)


def test_a_file_of_torch_under_another_name_is_refused(model):
    torch.save({"a": torch.zeros(1)}, model / "optimizer")
    with pytest.raises(EloError, match="is a pickle"):
        push(model, "me/model", dry_run=True)


def test_your_own_token_is_found_whatever_it_looks_like(model, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "a-token-of-another-kind")
    (model / "notes" / "a.txt").write_text("a-token-of-another-kind")
    with pytest.raises(EloError, match="looks like your Hugging Face token"):
        push(model, "me/model", dry_run=True)


def test_only_whole_models(model, tmp_path):
    with pytest.raises(EloError, match="no such folder"):
        push(tmp_path / "gone", "me/model", dry_run=True)
    with pytest.raises(EloError, match=r"has no config\.json; give the folder of a model"):
        push(tmp_path, "me/model", dry_run=True)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "stages").mkdir()
    with pytest.raises(EloError, match="is the folder of a run or a comparison; give its model"):
        push(tmp_path, "me/model", dry_run=True)
    model.rename(tmp_path / "elsewhere")
    with pytest.raises(EloError, match="is the folder of a run or a comparison; give the folder of a model"):
        push(tmp_path, "me/model", dry_run=True)
    model = tmp_path / "elsewhere"
    (model / "results.json").write_text("{}")
    assert "results.json" in push(model, "me/model", dry_run=True)["files"], "also a benchmark's file has this name"
    (model / "model.safetensors").write_bytes(b"short")
    with pytest.raises(EloError, match="not a safetensors file"):
        push(model, "me/model", dry_run=True)
