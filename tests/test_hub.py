"""Policies on the Hugging Face hub, of which a small server here speaks what huggingface_hub asks."""

import base64
import hashlib
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from components import UserError, export, load_policy
from components.run import hub as module

constants: Any = pytest.importorskip("huggingface_hub.constants")
TOKEN = "hf_writes"


class Hub(ThreadingHTTPServer):
    """Repositories in memory: name -> its commits, each a dict from file name to bytes, the newest last."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.repositories: dict[str, list[dict[str, bytes]]] = {}
        self.private: dict[str, bool] = {}
        self.claimed: dict[str, int] = {}  # sizes that it tells instead of the true ones
        self.stored: dict[str, bytes] = {}  # by SHA-256
        self.sent: list[str] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Answers(BaseHTTPRequestHandler):
    server: Any
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: Any) -> None:
        pass

    def answer(self, body: Any = b"", code: int = 200, **headers: Any) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(code)
        for key, value in {"Content-Length": len(data), **headers}.items():
            self.send_header(key.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def fail(self, code: int, kind: str, text: str) -> None:
        self.answer({"error": text}, code, X_Error_Code=kind, X_Error_Message=text)

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def find(self, name: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """Commit and files of a repository; None when the answer has been a refusal."""
        token = self.headers.get("Authorization", "")
        if name not in self.server.repositories or (self.server.private[name] and TOKEN not in token):
            self.fail(404 if token else 401, "RepoNotFound", "Repository not found")
            return None
        commits = self.server.repositories[name]
        number = len(commits) - 1 if revision == "main" else int(revision, 16) if len(revision) == 40 else -1
        if not 0 <= number < len(commits):
            self.fail(404, "RevisionNotFound", "Revision not found")
            return None
        return f"{number:040x}", commits[number]

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+).*)?", path):
            if (at := self.find(found[1], found[3] or "main")) is None:
                return
            commit, files = at
            sizes = {name: self.server.claimed.get(name, len(data)) for name, data in files.items()}
            if found[2] == "tree":
                ids = {name: hashlib.sha1(data).hexdigest() for name, data in files.items()}
                self.answer([{"type": "file", "path": n, "size": sizes[n], "oid": ids[n]} for n in files])
            else:
                siblings = [{"rfilename": name, "size": size} for name, size in sizes.items()]
                private = self.server.private[found[1]]
                about = {"id": found[1], "sha": commit, "private": private, "siblings": siblings, "tags": []}
                self.answer(about | {"downloads": 0, "likes": 0})  # which older clients expect
        elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            if (at := self.find(found[1], found[2])) is None:
                return
            if found[3] not in at[1]:
                self.fail(404, "EntryNotFound", "Entry not found")
                return
            data = at[1][found[3]]
            self.server.sent += [found[3]] * (self.command == "GET")
            self.answer(data, ETag=f'"{hashlib.sha1(data).hexdigest()}"', X_Repo_Commit=at[0])
        else:
            self.fail(404, "", f"unknown {path}")

    do_HEAD = do_GET  # noqa: N815

    def do_PUT(self) -> None:
        data = self.body()
        self.server.stored[hashlib.sha256(data).hexdigest()] = data
        self.answer()

    def do_POST(self) -> None:
        path, body = self.path.partition("?")[0], self.body()
        if path != "/api/validate-yaml" and TOKEN not in self.headers.get("Authorization", ""):
            self.fail(403, "", "Forbidden: you don't have the rights")
        elif path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'ann'}/{asked['name']}"
            exists = name in self.server.repositories
            if not exists:
                self.server.repositories[name] = [{".gitattributes": b"*.safetensors filter=lfs\n"}]
                self.server.private[name] = asked.get("private") or asked.get("visibility") == "private"
            self.answer({"url": f"{self.server.address}/{name}", "id": name}, 409 if exists else 200)
        elif path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif path.endswith("/preupload/main"):
            modes = {
                f["path"]: "lfs" if f["path"].endswith("safetensors") else "regular" for f in json.loads(body)["files"]
            }
            self.answer({"files": [{"path": n, "uploadMode": m, "shouldIgnore": False} for n, m in modes.items()]})
        elif path.endswith("/info/lfs/objects/batch"):
            objects = [
                {
                    "oid": o["oid"],
                    "size": o["size"],
                    "actions": {"upload": {"href": f"{self.server.address}/{o['oid']}"}},
                }
                for o in json.loads(body)["objects"]
            ]
            self.answer({"transfer": "basic", "objects": objects})
        else:
            self.commit(path.removeprefix("/api/models/").removesuffix("/commit/main"), body)

    def commit(self, name: str, body: bytes) -> None:
        files = dict(self.server.repositories[name][-1])
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.stored[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        self.server.repositories[name].append(files)
        number = len(self.server.repositories[name]) - 1
        url = f"{self.server.address}/{name}/commit/{number:040x}"
        self.answer({"commitUrl": url, "commitOid": f"{number:040x}", "success": True, "hookOutput": ""})


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """The server, which huggingface_hub takes for the hub, with an empty cache and a token."""
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    reach(monkeypatch, server.address)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True, raising=False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield server
    server.shutdown()
    server.server_close()


def reach(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    """As HF_ENDPOINT does before huggingface_hub is imported."""
    monkeypatch.setattr(constants, "ENDPOINT", address)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


@pytest.fixture
def run(script: Callable[..., Path]) -> Path:
    return script("--trainer", "bc", "--steps", 2, "--eval-episodes", 5, "--model.hidden-dims", 8)


def told(capsys: pytest.CaptureFixture[str], *words: Any) -> str:
    assert export.main([str(word) for word in words]) == 0
    return capsys.readouterr().out


def test_a_policy_goes_to_the_hub_and_comes_back(
    run: Path, hub: Hub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (run / "policy" / "policy.pt2").write_bytes(b"program")
    refused(lambda: export.main([str(run), "--to-hub", "ann/arm"]), "policy.pt2: damaged, or no exported policy")
    monkeypatch.setattr(export, "recognised", lambda *_: 0.0)
    out = told(capsys, run, "--to-hub", "ann/arm", "--private", "--licence", "apache-2.0")
    (files,) = hub.repositories["ann/arm"][1:]  # one commit
    names = {".gitattributes", "README.md", "policy.json", "model.safetensors", "policy.pt2"}
    assert set(files) == names and hub.private["ann/arm"]
    assert f"{hub.address}/ann/arm/commit/" in out and 'load_policy("hf://ann/arm")' in out
    assert files["model.safetensors"] == (run / "policy" / "model.safetensors").read_bytes()
    card = files["README.md"].decode()
    assert card.startswith("---\n") and str(run.parent) not in card
    parts = ('license: "apache-2.0"', 'pipeline_tag: "robotics"', "| data | `toy`", "| steps | 2 |", "## Command")
    for part in (*parts, '`policy.pt2` needs torch alone: `torch.export.load("policy.pt2").module()`'):
        assert part in card, part
    line = json.loads((run / "eval.jsonl").read_text().splitlines()[-1])
    assert re.search(rf"\| success rate \| {line['success_rate']:.2f} \[0.\d\d, \d.\d\d\] \| 5 \|", card), card

    here, there = load_policy(run), load_policy("hf://ann/arm")
    observation = {"observation.state": np.ones((3, 5), np.float32)}
    assert (here.act(observation) == there.act(observation)).all()
    assert sorted(hub.sent) == ["model.safetensors", "policy.json"]  # and nothing else
    load_policy("hf://ann/arm@main")
    load_policy("hf://ann/arm@" + "1".zfill(40), device="cpu")
    assert len(hub.sent) == 2  # cached
    told(capsys, run, "--to-hub", "ann/arm")  # again, without the program
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert load_policy("hf://ann/arm").act(observation).shape == (3, 2)  # from the cache, as that says
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub.shutdown()
    assert load_policy(Path("hf://ann/arm")).act(observation).shape == (3, 2)  # from the cache, without the hub


def test_settings_and_what_is_left_of_another_policy(run: Path, hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    hub.repositories["ann/arm"] = [{"policy.json": b"{}", "residual.json": b"{}", "base/policy.json": b"{}"}]
    hub.private["ann/arm"] = False
    told(capsys, run, "--to-hub", "ann/arm", "--policy.action-steps", 1)
    files = hub.repositories["ann/arm"][-1]
    assert "residual.json" not in files and "base/policy.json" not in files
    assert json.loads(files["policy.json"])["inference"]["action_steps"] == 1
    assert load_policy("hf://ann/arm").settings.action_steps == 1


def test_what_the_hub_refuses_is_one_line(
    run: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.repositories["ann/llm"] = [{"pytorch_model.bin": b"x", "README.md": b"mine"}]
    hub.repositories["bob/big"] = [{"policy.json": b"{}", "model.safetensors": b"x"}]
    hub.private |= {"ann/llm": False, "bob/big": False}
    hub.claimed["model.safetensors"] = 1 << 40
    for name, message in (
        ("hf://bob/none", r"hf://bob/none is not to be had .*: no such repository, or it is private"),
        ("hf://bob/big@old", "hf://bob/big@old is not to be had .*: it has no such revision"),
        ("hf://bob/big", "hf://bob/big: model.safetensors has 1099.5 GB; at most 34.4 are downloaded"),
        ("hf://ann/llm", "hf://ann/llm: no policy here"),
        ("hf://ann", "hf://ann: expected hf://USER/NAME"),
        ("hf://../etc", "expected hf://USER/NAME"),
    ):
        refused(lambda name=name: load_policy(name), message)  # type: ignore[misc]
    assert not hub.sent

    def upload(*words: str) -> Callable[[], Any]:
        return lambda: export.main([str(run), "--to-hub", *words])

    refused(upload("ann/llm"), "--to-hub ann/llm: it is of something else .pytorch_model.bin. and would be changed")
    refused(upload("bob/big", "--private"), "--to-hub bob/big: --private: it exists, and everybody sees it")
    refused(upload("ann"), "--to-hub ann: expected USER/NAME")
    refused(upload("ann/x", "--licence", "my: own"), "--licence 'my: own': expected an identifier of the hub")
    assert hub.repositories["ann/llm"] == [{"pytorch_model.bin": b"x", "README.md": b"mine"}]
    monkeypatch.setenv("HF_TOKEN", "hf_reads")
    refused(
        upload("ann/x"), r"--to-hub ann/x was not uploaded: the token is not valid here, or may not do this.*\(403\)"
    )
    monkeypatch.delenv("HF_TOKEN")
    refused(upload("ann/x"), "--to-hub ann/x: no token; log in once by: hf auth login")


def test_without_network_it_is_one_line_within_seconds(
    run: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as silent:  # it takes calls and never answers
        silent.bind(("127.0.0.1", 0))
        silent.listen(9)
        reach(monkeypatch, f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr(module, "SECONDS", 0.2)
        refused(lambda: load_policy("hf://ann/arm"), "hf://ann/arm is not to be had .*: ReadTimeout")
        refused(lambda: export.main([str(run), "--to-hub", "ann/x"]), "--to-hub ann/x was not uploaded: ReadTimeout")
    with socket.socket() as nobody:  # a port at which nobody listens
        nobody.bind(("127.0.0.1", 0))
        reach(monkeypatch, f"http://127.0.0.1:{nobody.getsockname()[1]}")
        refused(
            lambda: load_policy("hf://ann/arm"), "hf://ann/arm is not to be had .*ConnectError.*; check the network"
        )
        refused(
            lambda: export.main([str(run), "--to-hub", "ann/x"]), "--to-hub ann/x was not uploaded: .*check the net"
        )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refused(lambda: load_policy("hf://ann/arm"), "hf://ann/arm is not to be had")


def refused(call: Callable[[], Any], message: str) -> None:
    """It ends within seconds, in one line."""
    began = time.perf_counter()
    with pytest.raises(UserError, match=message) as error:
        call()
    assert "\n" not in str(error.value) and time.perf_counter() - began < 10


def test_a_card_tells_apart_what_acted_otherwise_and_what_a_robot_observes_and_executes(tmp_path: Path) -> None:
    line: dict[str, Any] = {"step": 9, "env": {"name": "metaworld", "task": "push-v3"}, "episodes": 5}
    line |= {"success_rate": None, "success_ci": None}
    lines = [line | {"return_mean": 1.0, "inference": {"sampler": "euler", "sampling_steps": n}} for n in (10, 2)]
    (tmp_path / "eval.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    (_, _, *rows) = module._figures(tmp_path, export.Chosen(tmp_path, 9, ""))
    assert [row.split(" | ")[0] for row in rows] == [f"| metaworld push-v3, sampling_steps {n}" for n in (10, 2)]

    spec: dict[str, Any] = {"observation.state": {"shape": [2, 12], "dtype": "float32"}}
    spec["action"] = {"shape": [16, 10], "fps": 30.0, "form": {"width": 7}}  # a rotation is learnt as 6 numbers
    spec |= {"action_is_pad": {"shape": [16]}}
    facts = dict(module._facts(export.Chosen(tmp_path, 9, ""), {"spec": spec, "inference": {"delay": 0}}, None))
    assert facts["observations"] == "`observation.state` [12], the last 2" and "inference" not in facts
    assert facts["action"] == "[16, 7] at 30 Hz"


def test_a_card_names_files_but_no_folders_of_this_machine() -> None:
    about = {
        "command": [
            "offline_trainer.py",
            "--run-dir",
            "/home/ann/x",
            "--dataset.path",
            "/home/ann/my demos",
            "--a",
            "b",
        ]
    }
    assert module._command(about) == ["offline_trainer.py", "--dataset.path", "'my demos'", "--a", "b"]
