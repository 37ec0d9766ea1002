"""The container files agree with their schema, with each other, and with what Tandem reads."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from shared.config import TandemConfig
from tests.compose import COMPOSE, CPU, ROOT, interpolate, load, overlay, seconds, service

HANDLE = ROOT / "deploy/compose.handle.yaml"
OURS = ("model", "prefill", "decode", "gateway")
WORKERS = ("prefill", "decode")
SECRET = re.compile(r"(KEY|KEYS|TOKEN|PASSWORD|SECRET)$")


@pytest.fixture(scope="module")
def gpu() -> dict[str, Any]:
    return load(COMPOSE)


@pytest.fixture(scope="module")
def cpu() -> dict[str, Any]:
    return load(COMPOSE, CPU)


def test_every_combination_is_valid(tmp_path: Path) -> None:
    paths = []
    for name, files in {"gpu": (COMPOSE,), "cpu": (COMPOSE, CPU), "handle": (COMPOSE, HANDLE)}.items():
        paths.append(tmp_path / f"{name}.json")
        paths[-1].write_text(json.dumps(load(*files)))
    check = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    done = subprocess.run([*check, *map(str, paths)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    paths[0].write_text(paths[0].read_text().replace('"read_only"', '"read_onyl"'))
    assert subprocess.run([*check, str(paths[0])], capture_output=True).returncode == 1


@pytest.mark.parametrize("name", OURS)
def test_a_container_of_ours_can_do_as_little_as_possible(gpu: dict[str, Any], cpu: dict[str, Any], name: str) -> None:
    for project in (gpu, cpu):
        keys = project["services"][name]
        assert keys["read_only"] is True
        assert keys["init"] is True
        assert keys["cap_drop"] == ["ALL"]
        assert keys["security_opt"] == ["no-new-privileges:true"]
        assert keys["user"] == "1000:1000"
        assert not keys.keys() & {
            "pid",
            "ipc",
            "uts",
            "userns_mode",
            "network_mode",
            "privileged",
            "cap_add",
            "devices",
        }
        assert "container_name" not in keys
        assert name == "gateway" or "ports" not in keys


def test_only_the_one_service_that_must_reaches_the_network_outside(gpu: dict[str, Any]) -> None:
    assert gpu["networks"]["cluster"]["internal"] is True
    for name in WORKERS:
        assert gpu["services"][name]["networks"] == ["cluster"]


def test_ports_are_published_to_this_host_alone_unless_asked(gpu: dict[str, Any]) -> None:
    published = [port for keys in gpu["services"].values() for port in keys.get("ports", ())]
    assert len(published) == 4
    assert all(port.startswith("127.0.0.1:") for port in published)
    elsewhere = load(COMPOSE, variables={"TANDEM_PUBLISH": "0.0.0.0", "TANDEM_HTTP_PORT": "80"})
    assert elsewhere["services"]["gateway"]["ports"] == ["0.0.0.0:50051:50051", "0.0.0.0:80:8080"]


def test_no_secret_stands_in_the_files() -> None:
    for path in (COMPOSE, CPU, HANDLE):
        for name, keys in yaml.load(path.read_text().replace("!reset", ""), yaml.SafeLoader)["services"].items():
            for variable, value in (keys.get("environment") or {}).items():
                assert value is None or not SECRET.search(variable), f"{path.name}: {name} sets {variable}"
    passed = load(COMPOSE, variables={"TANDEM_AUTH__CLUSTER_KEY": "swordfish"})
    for name in (*WORKERS, "gateway"):
        assert service(passed, name).environment["TANDEM_AUTH__CLUSTER_KEY"] == "swordfish"
        assert "TANDEM_AUTH__CLUSTER_KEY" not in service(load(COMPOSE), name).environment


@pytest.mark.parametrize("name", OURS)
def test_what_the_environment_sets_is_a_setting(cpu: dict[str, Any], name: str) -> None:
    variables = [variable for variable in service(cpu, name).environment if variable.startswith("TANDEM_")]
    assert variables or name == "model"
    for variable in variables:
        model: Any = TandemConfig
        for part in variable.removeprefix("TANDEM_").lower().split("__"):
            assert issubclass(model, BaseModel), variable
            assert part in model.model_fields, f"{variable} means nothing"
            model = model.model_fields[part].annotation


def test_the_gateway_looks_for_the_workers_where_they_listen(gpu: dict[str, Any]) -> None:
    gateway = service(gpu, "gateway").environment
    for name in WORKERS:
        worker = service(gpu, name)
        port = worker.environment[f"TANDEM_{name.upper()}__PORT"]
        assert worker.environment[f"TANDEM_{name.upper()}__HOST"] == "0.0.0.0"
        assert gateway[f"TANDEM_GATEWAY__{name.upper()}_WORKERS"] == f"{name}:{port}"
        assert worker.healthcheck is not None
        assert worker.healthcheck.test == ["CMD", "./tandem", "health", f"127.0.0.1:{port}"]


def test_all_agree_on_what_the_gateway_compares(gpu: dict[str, Any]) -> None:
    for variable in ("TANDEM_MODEL", "TANDEM_DTYPE", "TANDEM_QUANTIZATION", "TANDEM_QUANTIZATION_EXCLUDE"):
        assert len({service(gpu, name).environment[variable] for name in (*WORKERS, "gateway")}) == 1
    assert service(gpu, "model").command[-1] == service(gpu, "gateway").environment["TANDEM_MODEL"]


def test_a_container_is_given_longer_than_it_takes_to_drain(gpu: dict[str, Any]) -> None:
    for name in (*WORKERS, "gateway"):
        drain_s = float(service(gpu, name).environment["TANDEM_DRAIN_S"])
        assert seconds(gpu["services"][name]["stop_grace_period"]) >= drain_s + 10


def test_the_device_is_what_the_host_has(gpu: dict[str, Any], cpu: dict[str, Any]) -> None:
    for name in WORKERS:
        assert service(gpu, name).environment["TANDEM_DEVICE"] == "cuda"
        [device] = gpu["services"][name]["deploy"]["resources"]["reservations"]["devices"]
        assert device["capabilities"] == ["gpu"]
        assert service(gpu, name).environment["TANDEM_TRANSPORT__REQUIRE"] == "cuda_ipc"
        assert service(cpu, name).environment["TANDEM_DEVICE"] == "cpu"
        assert service(cpu, name).environment["TANDEM_TRANSPORT__REQUIRE"] == "shared_memory"
        assert "deploy" not in cpu["services"][name]
    for name in OURS:
        assert cpu["services"][name]["build"]["args"]["EXTRA"] == ""
        assert cpu["services"][name]["image"] != gpu["services"][name]["image"]
    assert "deploy" not in gpu["services"]["gateway"]


def test_the_image_and_the_services_mean_the_same_user_and_folders(gpu: dict[str, Any]) -> None:
    dockerfile = (ROOT / "Dockerfile").read_text()
    keys = gpu["services"]["decode"]
    assert f"\nUSER {keys['user']}\n" in dockerfile
    assert 'ENTRYPOINT ["./tandem"]' in dockerfile
    uid, _, gid = keys["user"].partition(":")
    assert {f"uid={uid}", f"gid={gid}", "mode=0700"} <= set(gpu["volumes"]["sockets"]["driver_opts"]["o"].split(","))
    environment = service(gpu, "decode").environment
    targets = {source: target for source, target, _ in service(gpu, "decode").volumes}
    assert f"ENV HOME={targets['cache']} XDG_CACHE_HOME={targets['cache']}\n" in dockerfile
    assert environment["HOME"] == environment["XDG_CACHE_HOME"] == targets["cache"]
    assert environment["TANDEM_TRANSPORT__SOCKET_DIR"] == targets["sockets"]
    for folder in targets.values():
        assert re.search(rf"install --directory --owner tandem .* {folder}\b", dockerfile)
    for argument in cpu_arguments():
        assert f"\nARG {argument}=" in dockerfile


def cpu_arguments() -> list[str]:
    return list(load(COMPOSE, CPU)["services"]["decode"]["build"]["args"])


def test_the_image_holds_what_the_roles_run() -> None:
    kept = [line.removeprefix("!") for line in (ROOT / ".dockerignore").read_text().splitlines() if line[:1] == "!"]
    assert all(list(ROOT.glob(pattern)) for pattern in kept)
    needed = {
        "tandem",
        "cli",
        "gateway",
        "prefill_worker",
        "decode_worker",
        "shared",
        "kernels",
        "protos",
        "tools/setup",
    }
    assert needed <= set(kept)
    for copied in re.findall(r"^COPY (?!--from)(.+) \S+$", (ROOT / "Dockerfile").read_text(), re.MULTILINE):
        assert all(part == "." or part in kept for part in copied.split())


def test_monitoring_is_wired_up(gpu: dict[str, Any]) -> None:
    prometheus = yaml.safe_load((ROOT / "deploy/prometheus.yml").read_text())
    [job] = prometheus["scrape_configs"]
    [target] = job["static_configs"][0]["targets"]
    assert target == f"gateway:{service(gpu, 'gateway').environment['TANDEM_GATEWAY__HTTP_PORT']}"
    [key] = gpu["services"]["prometheus"]["configs"]
    assert job["authorization"]["credentials_file"] == key["target"]
    assert key["source"] in gpu["configs"]
    grafana = ROOT / "deploy/grafana"
    [source] = yaml.safe_load((grafana / "provisioning/datasources/prometheus.yaml").read_text())["datasources"]
    assert source["url"] == "http://prometheus:9090"
    [provider] = yaml.safe_load((grafana / "provisioning/dashboards/tandem.yaml").read_text())["providers"]
    dashboard = json.loads((grafana / "dashboards/tandem.json").read_text())
    assert {panel["datasource"]["uid"] for panel in dashboard["panels"] if "targets" in panel} == {source["uid"]}
    targets = {}
    for name in ("prometheus", "grafana"):
        assert gpu["services"][name]["profiles"] == ["monitoring"]
        for path, place, _ in service(gpu, name).volumes:
            assert not path.startswith("./") or (ROOT / path).exists()
            targets[place] = path
    assert targets[provider["options"]["path"]] == "./deploy/grafana/dashboards"


def test_namespaces_are_shared_in_the_one_file_that_says_so(gpu: dict[str, Any]) -> None:
    shared = load(COMPOSE, HANDLE)
    for name in WORKERS:
        keys = shared["services"][name]
        assert (keys["pid"], keys["ipc"]) == ("host", "host")
        assert service(shared, name).environment["TANDEM_TRANSPORT__CUDA_EXPORT"] == "handle"
    assert "pid" not in shared["services"]["gateway"]


# -- how the files are read -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "filled"),
    [
        ("${A:-1}", "1"),
        ("${A-1}", "1"),
        ("${B:-1}", "b"),
        ("${E:-1}", "1"),
        ("${E-1}", ""),
        ("${A:-${B}}-$B-$$B", "b-b-$B"),
        ("${A:-${C:-x}}:${B}}", "x:b}"),
        ("${B:?needed}", "b"),
        ("a:b", "a:b"),
    ],
)
def test_variables_are_filled_in(text: str, filled: str) -> None:
    assert interpolate(text, {"B": "b", "E": ""}) == filled


@pytest.mark.parametrize("text", ["${A:?needed}", "${A", "${A:+1}", "$1"])
def test_what_cannot_be_filled_in_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"A|\$"):
        interpolate(text, {})


def test_a_later_file_is_laid_over() -> None:
    below = {"a": {"command": ["x"], "volumes": ["v"], "environment": {"A": "1", "B": "1"}, "user": "0"}}
    above = {"a": {"command": ["y"], "volumes": ["w"], "environment": {"B": "2"}}}
    merged = {"command": ["y"], "volumes": ["v", "w"], "environment": {"A": "1", "B": "2"}, "user": "0"}
    assert overlay(below, above) == {"a": merged}


def test_durations() -> None:
    assert seconds("1m30s") == 90
    assert seconds("500ms") == 0.5
    with pytest.raises(ValueError, match="no duration"):
        seconds("10")
