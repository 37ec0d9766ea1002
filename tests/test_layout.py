"""Who may import whom, and what must stay free of torch. The rules are those of docs/architecture.md."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# folder -> what of ours it may import besides itself; `tandem` are the protobuf stubs
MAY_IMPORT = {
    "kernels": set(),
    "shared": {"kernels", "tandem"},
    "gateway": {"shared", "tandem"},
    "prefill_worker": {"shared", "tandem"},
    "decode_worker": {"shared", "tandem"},
    "cli": {"shared", "tandem", "benchmarks"},
    "benchmarks": {"shared", "kernels", "tandem", "cli"},
    "examples": {"shared", "tandem"},
}
OURS = {*MAY_IMPORT, "tandem", "tests"}

# package -> the only places that may import it
ONLY_IN = {
    "triton": ("kernels/",),
    "transformers": ("shared/model_convert.py", "shared/engine/hugging_face.py"),
    "diffusers": ("shared/engine/diffusers_models.py",),
    "nixl": ("shared/transport/",),
    "cuda": ("shared/transport/",),
}

# files of `shared` that never load torch, besides those that the gateway imports; the others may
PLAIN = (
    "address",
    "arguments",
    "auth",
    "chat_template",
    "config",
    "config.modules",
    "detokenizer",
    "logs",
    "model_files",
    "model_source",
    "model_store",
    "parallel.follower",
    "parallel.link",
    "parallel.partition",
    "parallel.sharding",
    "rpc",
    "tokenizer",
)


def files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def imports(source: str) -> Iterator[str]:
    """Every module that a file imports, wherever the import stands in it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute"
            yield f"{node.module}"


def top_level(source: str) -> set[str]:
    return {name.partition(".")[0] for name in imports(source)}


def test_every_kind_of_import_is_seen():
    source = "import a.b as x\nfrom c.d import e\ndef f():\n    import g\n    from h import i\n"
    assert top_level(source) == {"a", "c", "g", "h"}
    with pytest.raises(AssertionError, match="absolute"):
        top_level("from . import x")


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_folder_imports_only_what_it_may(folder: str):
    found = files(folder)
    assert found, f"{folder}/ holds no Python"
    for path in found:
        foreign = top_level(path.read_text()) & OURS - {folder} - MAY_IMPORT[folder]
        assert not foreign, f"{path.relative_to(ROOT)} imports {', '.join(sorted(foreign))}"


def test_stubs_import_nothing_of_ours():
    for path in files("protos"):
        foreign = top_level(path.read_text()) & OURS - {"tandem"}
        assert not foreign, f"{path.relative_to(ROOT)} imports {foreign}"


@pytest.mark.parametrize("package", ONLY_IN)
def test_package_is_imported_only_where_it_belongs(package: str):
    for folder in MAY_IMPORT.keys() - {"benchmarks", "examples"}:
        for path in files(folder):
            name = str(path.relative_to(ROOT))
            if not name.startswith(ONLY_IN[package]):
                assert package not in top_level(path.read_text()), f"{name} imports {package}"


def test_gateway_and_plain_files_load_no_torch():
    light = [path for folder in ("gateway", "cli") for path in files(folder)]
    modules = {f"shared.{name}" for name in PLAIN}
    # imports inside functions count as well
    modules |= {name for path in light for name in imports(path.read_text()) if name.startswith("shared.")}
    modules |= {
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in light
        if path.name not in ("__init__.py", "__main__.py")
    }
    script = "\n".join(
        [
            "import sys",
            *(f"import {module}" for module in sorted(modules)),
            "print(*sorted({'torch', 'transformers', 'diffusers', 'triton'} & sys.modules.keys()))",
        ]
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


def test_kernels_package_is_a_docstring_alone():
    # transformers looks for a PyPI package called `kernels`, finds our folder and runs this file
    body = ast.parse((ROOT / "kernels/__init__.py").read_text()).body
    assert len(body) == 1
    assert isinstance(body[0], ast.Expr)
    assert isinstance(body[0].value, ast.Constant)


def test_no_distribution_shadows_a_folder_of_ours():
    names = {distribution.metadata["Name"].lower() for distribution in distributions()}
    assert "kernels" not in names, "uninstall the PyPI package `kernels`: it and our folder hide each other"


def test_test_folders_are_no_packages():
    # a tests/shared/__init__.py would hide shared/ from its own tests
    assert not list((ROOT / "tests").rglob("__init__.py"))


def test_only_the_stubs_are_installed():
    done = subprocess.run(
        [sys.executable, "-P", "-c", "import tandem.v1.kv_pb2, importlib.util as u; print(u.find_spec('shared'))"],
        cwd="/",
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "None"
