"""Publishing, with a local server that imitates the Hub's HTTP API."""

import base64
import json
import os
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from modeling_2dmse import TwoDMSEModel, parse_ladder
from run_scripts.push_to_hub import main
from trainer.model_card import Run, build_card, write_card
from trainer.objectives import Objective

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def model_folder(tiny_model, tmp_path):
    folder = tmp_path / "model"
    model = tiny_model()
    model.save_pretrained(folder)
    objective = Objective("starbucks", parse_ladder(["1x8", "4x32"]), 4, 32)
    results = {"sts": {"s": {"spearman": {"1x8": 0.5, "4x32": 0.6}}}}
    write_card(folder, build_card(model, objective, Run("model", results=results)))
    (folder / "results.json").write_text("{}")
    (folder / "heatmap.png").write_bytes(b"\x89PNG")
    (folder / "checkpoint-3").mkdir()
    (folder / "checkpoint-3" / "optimizer.pt").write_bytes(b"x")
    (folder / "training_args.bin").write_bytes(b"x")
    return folder


WANTED = {
    "config.json", "model.safetensors", "tokenizer.json", "modeling_2dmse.py", "configuration_2dmse.py", "backbone.py",
    "batching.py", "formats.py", "encoding.py", "modules.json", "1_Pooling/config.json", "README.md", "results.json",
    "heatmap.png",
}  # fmt: skip


def test_a_bare_dry_run_only_lists(model_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    main(["--dry_run", "--model_name_or_path", str(model_folder), "--repo_id", "org/elastic"])
    *files, last = capsys.readouterr().out.splitlines()
    assert {"README.md", "model.safetensors"} <= set(files)
    assert last == f"{len(files)} files; nothing was uploaded"
    assert sorted(tmp_path.iterdir()) == before


def test_dry_run_writes_and_lists_what_would_be_uploaded(model_folder, tmp_path, capsys):
    flags = ["--model_name_or_path", str(model_folder), "--repo_id", "org/elastic", "--dry_run", str(tmp_path / "dry")]
    main(flags)
    listed = set(capsys.readouterr().out.splitlines()[:-1])
    assert listed >= WANTED
    assert not {name for name in listed if "checkpoint" in name or name == "training_args.bin"}
    assert listed == {str(p.relative_to(tmp_path / "dry")) for p in (tmp_path / "dry").rglob("*") if p.is_file()}
    card = ModelCard.load(tmp_path / "dry" / "README.md")
    assert 'from_pretrained("org/elastic"' in card.text
    assert card.data.to_dict()["model-index"][0]["name"] == "org/elastic"
    assert TwoDMSEModel.from_pretrained(tmp_path / "dry").num_layers == 4
    with pytest.raises(SystemExit, match="2"):
        main(flags)
    assert "is not empty" in capsys.readouterr().err


class Hub(BaseHTTPRequestHandler):
    """Answers the few calls that create a repository and one commit, and records them in `server.calls`."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.calls.append((self.path, self.headers.get("Authorization"), body))
        address = f"http://127.0.0.1:{self.server.server_port}/org/elastic"
        if "/preupload/" in self.path:
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            return self.answer({"files": files})
        if "/commit/" in self.path:
            return self.answer({"commitUrl": f"{address}/commit/abc", "commitOid": "abc", "success": True})
        if self.path == "/api/repos/create":
            return self.answer({"url": address, "id": "org/elastic"})
        return self.answer({"errors": [], "warnings": []})

    def do_GET(self):
        self.server.calls.append((self.path, self.headers.get("Authorization"), b""))
        self.answer({"id": "org/elastic", "sha": "0" * 40, "siblings": [], "private": True})

    def answer(self, content):
        data = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.calls = []
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def environment_of(folder, hub, token="hf_test"):
    environment = {**os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HUB_OFFLINE": "0"}
    environment |= {"HF_HOME": str(folder.parent / "home"), "HF_HUB_DISABLE_TELEMETRY": "1"}
    environment.pop("HF_TOKEN", None)
    if token:
        environment["HF_TOKEN"] = token
    return environment


def push(folder, hub, *flags, token="hf_test"):
    environment = environment_of(folder, hub, token)
    command = [sys.executable, str(ROOT / "run_scripts" / "push_to_hub.py"), "--model_name_or_path", str(folder)]
    command += ["--repo_id", "org/elastic", *flags]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_upload(model_folder, hub):
    done = push(model_folder, hub, "--private", "true", "--revision", "v1")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "/org/elastic/commit/abc" in done.stdout
    assert {authorization for _, authorization, _ in hub.calls} == {"Bearer hf_test"}
    (created,) = [json.loads(body) for path, _, body in hub.calls if path == "/api/repos/create"]
    assert (created["name"], created["organization"], created["visibility"]) == ("elastic", "org", "private")
    assert [path for path, _, _ in hub.calls if path.endswith("/branch/v1")]
    (commit,) = [body for path, _, body in hub.calls if path.endswith("/commit/v1")]
    files = committed(commit)
    assert set(files) >= WANTED
    assert files["model.safetensors"] == (model_folder / "model.safetensors").read_bytes()
    assert b'from_pretrained("org/elastic"' in files["README.md"]


FROM_THE_TRAINER = """
import sys
sys.path.insert(0, sys.argv[3])
from datasets import Dataset
from modeling_2dmse import TwoDMSEModel
from trainer import TwoDMSETrainer, TwoDMSETrainingArguments
args = TwoDMSETrainingArguments(
    output_dir=sys.argv[2], hub_model_id="org/elastic", hub_private_repo=True, use_cpu=True, bf16=False,
    per_device_train_batch_size=2, report_to="none",
)
model = TwoDMSEModel.from_pretrained(sys.argv[1])
scored = Dataset.from_dict({"sentence1": ["a man", "a cat"], "sentence2": ["the dog", "rain"], "score": [0.1, 0.9]})
trainer = TwoDMSETrainer(model=model, args=args, train_dataset=scored, eval_dataset=scored)
trainer.push_to_hub()
"""


def test_push_to_hub_of_the_trainer(model_folder, hub, tmp_path):
    (tmp_path / "run.py").write_text(FROM_THE_TRAINER)
    command = [sys.executable, str(tmp_path / "run.py"), str(model_folder), str(tmp_path / "out"), str(ROOT)]
    environment = environment_of(model_folder, hub)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    (commit,) = [body for path, _, body in hub.calls if path.endswith("/commit/main")]
    files = committed(commit)
    assert set(files) >= WANTED - {"results.json", "heatmap.png"}
    assert b"| 4x32 |" in files["README.md"]


def committed(body: bytes) -> dict[str, bytes]:
    entries = [json.loads(line) for line in body.splitlines()]
    return {e["value"]["path"]: base64.b64decode(e["value"]["content"]) for e in entries if e["key"] == "file"}


def test_no_token(model_folder, hub):
    done = push(model_folder, hub, token=None)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("push_to_hub.py: error: token: there is none; run `hf auth")
    assert hub.calls == []


def test_wrong_input(model_folder, tmp_path, capsys):
    for folder, repo, message in (
        (model_folder, "not a name", "repo_id: 'not a name' is not a valid Hub name; use the form owner/name"),
        (model_folder, "name", "repo_id: 'name' is not a valid Hub name"),
        (tmp_path, "org/name", "is not a saved elastic model: config.json"),
        (tmp_path / "absent", "org/name", "is not a folder"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main(["--model_name_or_path", str(folder), "--repo_id", repo])
        assert message in capsys.readouterr().err


def refused(folder, target, capsys, message):
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        main(["--model_name_or_path", str(folder), "--repo_id", "org/elastic", "--dry_run", str(target)])
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert message in line
    assert not target.exists()


def test_links_out_of_the_folder_are_not_published(model_folder, tmp_path, capsys):
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "key.txt").write_text("private")
    (tmp_path / "loop").symlink_to(tmp_path)
    for name, target in (
        ("notes.txt", secret / "key.txt"),
        ("notes", secret),
        ("again", model_folder),
        ("1_Pooling/up", model_folder / "README.md/../.."),
        ("gone.txt", tmp_path / "nowhere"),
    ):
        (model_folder / name).symlink_to(target)
        refused(model_folder, tmp_path / "dry", capsys, f"{name} is a link to ")
        (model_folder / name).unlink()
    os.mkfifo(model_folder / "pipe")
    refused(model_folder, tmp_path / "dry", capsys, "pipe is not a file")
    (model_folder / "pipe").unlink()
    (model_folder / "LICENSE").symlink_to("README.md")  # a link inside the folder: its file is published
    (tmp_path / "link").symlink_to(model_folder)
    main(
        ["--model_name_or_path", str(tmp_path / "link"), "--repo_id", "org/elastic", "--dry_run", str(tmp_path / "dry")]
    )
    assert (tmp_path / "dry" / "LICENSE").is_file()
    assert not [path for path in (tmp_path / "dry").rglob("*") if path.is_symlink()]


def test_an_interrupted_dry_run_does_not_block_the_next(model_folder, tmp_path, monkeypatch):
    flags = ["--model_name_or_path", str(model_folder), "--repo_id", "org/elastic", "--dry_run", str(tmp_path / "dry")]

    def stop(folder, target, **more):
        Path(target).mkdir(exist_ok=True)
        Path(target, "half").write_text("half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copytree", stop)
        with pytest.raises(KeyboardInterrupt):
            main(flags)
    assert not list(tmp_path.glob("*dry*"))
    main(flags)
    assert (tmp_path / "dry" / "config.json").is_file()


def test_the_target_of_a_dry_run_is_not_copied_into_itself(model_folder, tmp_path, capsys):
    for target in (model_folder / "dry", model_folder / "1_Pooling" / "dry"):
        refused(model_folder, target, capsys, f"dry_run: {target} is inside {model_folder}")


def test_what_does_not_load_is_not_published(model_folder, tmp_path, capsys):
    weights, config = model_folder / "model.safetensors", model_folder / "config.json"
    whole, settings = weights.read_bytes(), json.loads(config.read_text())
    for damaged in (whole[:-40], b"", b"\x80\x04pickle", whole[:8] + b"{" + whole[9:20]):
        weights.write_bytes(damaged)
        refused(model_folder, tmp_path / "dry", capsys, "does not load, so it is not published: ")
    weights.write_bytes(whole)
    wide = {**settings["backbone_config"], "hidden_size": 64}
    for changed in ("{", "[]", json.dumps(settings | {"backbone_config": wide}), json.dumps(settings | {"sizes": 5})):
        config.write_text(changed)
        refused(model_folder, tmp_path / "dry", capsys, "does not load, so it is not published: ")
    config.write_text(json.dumps(settings))
    for name in ("tokenizer.json", "tokenizer_config.json", "1_Pooling/config.json", "modules.json"):
        kept = (model_folder / name).read_text()
        (model_folder / name).write_text("[3" if name == "modules.json" else "[]")
        refused(model_folder, tmp_path / "dry", capsys, "does not load, so it is not published: ")
        (model_folder / name).write_text(kept)


def test_nothing_is_written_for_a_damaged_card(model_folder, tmp_path, capsys):
    (model_folder / "README.md").write_text("---\na: [b\n---\n")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    words = ["--model_name_or_path", str(model_folder), "--repo_id", "org/elastic", "--dry_run"]
    with pytest.raises(SystemExit, match="2"):
        main([*words, str(tmp_path / "link")])
    assert "README.md is not YAML" in capsys.readouterr().err
    assert list((tmp_path / "empty").iterdir()) == []
