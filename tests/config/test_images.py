"""Dockerfile, compose.yaml and the systemd units name what there is."""

import configparser
import json
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import yaml
from django.apps import apps
from django.core.management import get_commands
from django.utils.module_loading import import_string

from deploy import pin_images
from ops.middleware import PROBES
from tests.docs.test_settings import ROOT, read_by_settings

DOCKERFILE = (ROOT / "Dockerfile").read_text()
COMPOSE = yaml.safe_load((ROOT / "compose.yaml").read_text())
SERVICES: dict[str, Any] = COMPOSE["services"]
OURS = {name: service for name, service in SERVICES.items() if service["image"] == "botrealm"}
UNITS = sorted((ROOT / "deploy/systemd").iterdir())
# Read by the web server, by Python and by compose.yaml itself.
ELSEWHERE = {"PATH", "MALLOC_ARENA_MAX", "PYTHONUNBUFFERED", "PORT", "MATRIX_SERVER_NAME"} | {
    "POSTGRES_PASSWORD",
    "REDIS_PASSWORD",
}
EXAMPLES = ("compose.env.example", "settings.env.example")


def image_command() -> list[str]:
    [command] = re.findall(r"^CMD (\[.*\])$", DOCKERFILE, re.M)
    return list(json.loads(command))


def unit(path: Path) -> configparser.RawConfigParser:
    parser = configparser.RawConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read(path)
    return parser


COMMANDS = {
    "Dockerfile": image_command(),
    **{
        f"compose.yaml: {name}": service["command"]
        for name, service in OURS.items()
        if "command" in service
    },
    **{path.name: unit(path)["Service"]["ExecStart"].split() for path in UNITS},
}


@pytest.mark.parametrize("where", COMMANDS)
def test_a_command_is_there_and_knows_its_options(where: str) -> None:
    program, *arguments = COMMANDS[where]
    program = program.removeprefix("/opt/botrealm/.venv/bin/")
    if program == "python":
        assert arguments[0] == "manage.py"
        assert arguments[1] in get_commands()
        return
    assert (Path(sys.executable).parent / program).exists()
    asked = [program, "--help"] if program == "uvicorn" else [program, "worker", "--help"]
    result = subprocess.run(
        [sys.executable, "-m", *asked], capture_output=True, text=True, timeout=300, check=True
    ).stdout
    options = {argument for argument in arguments if argument.startswith("--")}
    assert {name for name in options if name not in result} <= {"--quiet"}  # celery's own
    for target in (argument for argument in arguments if ":" in argument):
        assert callable(import_string(target.replace(":", ".")))


def test_every_process_is_everywhere() -> None:
    processes = {"uvicorn", "celery", "manage.py"}
    for words in (
        [
            word
            for command in [image_command(), *(s.get("command", []) for s in OURS.values())]
            for word in command
        ],
        [word for path in UNITS for word in re.split(r"[\s/]", unit(path)["Service"]["ExecStart"])],
    ):
        assert processes <= set(words)


def test_variables_are_those_of_the_settings() -> None:
    template = "".join((ROOT / "deploy" / name).read_text() for name in EXAMPLES)
    units = "\n".join(path.read_text() for path in UNITS)
    named = {
        *re.findall(r"(?:^ENV |\s)([A-Z][A-Z_]+)=", DOCKERFILE),
        *(name for service in OURS.values() for name in service["environment"]),
        *re.findall(r"\$\{([A-Z_]+)", (ROOT / "compose.yaml").read_text()),
        *re.findall(r"^([A-Z_]+)=", template, re.M),
        *re.findall(r"^Environment=([A-Z_]+)=", units, re.M),
    }

    unknown = {name for name in named if not name.startswith(("WEB_CONCURRENCY", "PIP_"))}
    assert unknown <= read_by_settings() | ELSEWHERE
    assert {"SECRET_KEY", "DEBUG", "DATABASE_URL", "WORKER_GRACE_SECONDS"} <= named


def test_health_checks_ask_the_probes() -> None:
    [asked] = re.findall(r"^HEALTHCHECK .*\n +CMD (\[.*\])$", DOCKERFILE, re.M)
    of_the_image = json.loads(asked)[-1]
    of_web = SERVICES["web"]["healthcheck"]["test"][-1]

    for script, probe in ((of_the_image, "/healthz"), (of_web, "/readyz")):
        compile(script, "healthcheck", "exec")
        assert re.findall(r'"(/\w+)"', script.replace("'", '"')) == [probe]
        assert probe in PROBES


def test_what_web_processes_count_begins_anew_at_each_start() -> None:
    web = SERVICES["web"]
    folder = Path(web["environment"]["PROMETHEUS_MULTIPROC_DIR"])
    assert str(folder.parent) in web["tmpfs"]

    service = unit(ROOT / "deploy/systemd/botrealm-web.service")["Service"]
    text = (ROOT / "deploy/systemd/botrealm-web.service").read_text()
    assert f"PROMETHEUS_MULTIPROC_DIR=/run/{service['RuntimeDirectory']}\n" in text
    assert "RuntimeDirectoryPreserve" not in text


def test_the_image_is_of_the_python_that_is_tested() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    versions = set(re.findall(r"^FROM python:([\d.]+)-slim", DOCKERFILE, re.M))

    assert versions == {project["tool"]["mypy"]["python_version"]}


def test_the_image_has_what_celerys_redis_transport_imports() -> None:
    """Tools of the tests bring it too, so that nobody else would miss it."""
    wanted = [r for r in metadata.requires("kombu") or [] if 'extra == "redis"' in r]
    pinned = set(re.findall(r"^([a-z-]+)", (ROOT / "requirements/base.in").read_text(), re.M))

    assert wanted
    assert {re.split(r"[^a-z-]", requirement)[0] for requirement in wanted} <= pinned


def test_the_homeserver_is_the_one_that_is_tested() -> None:
    [pinned] = re.findall(
        r"^matrix-synapse==(.+)$", (ROOT / "requirements/homeserver.in").read_text(), re.M
    )

    for name in ("homeserver", "homeserver-config"):
        assert SERVICES[name]["image"] == f"matrixdotorg/synapse:v{pinned}"


def test_the_image_has_every_app_and_no_secret() -> None:
    ignored = (ROOT / ".dockerignore").read_text().split()
    ours = {
        Path(app.path).relative_to(ROOT).parts[0]
        for app in apps.get_app_configs()
        if Path(app.path).parent == ROOT
    }

    assert {f"!{name}" for name in (*ours, "config", "templates", "manage.py")} <= set(ignored)
    assert ignored.index("*") < ignored.index("!manage.py")
    assert not {"!.env", "!tests", "!db", "!.git"} & set(ignored)
    for source in re.findall(r"^COPY (requirements/\S+) (requirements/\S+) ", DOCKERFILE, re.M)[0]:
        assert f"!{source}" in ignored
        assert (ROOT / source).is_file()


def seconds(text: str) -> float:
    return float(text.removesuffix("s"))


def test_whatever_stops_a_process_waits_for_longer_than_it_takes() -> None:
    def after(words: list[str], option: str) -> float:
        return float(words[words.index(option) + 1])

    of_web = after(image_command(), "--timeout-graceful-shutdown")
    assert seconds(OURS["web"]["stop_grace_period"]) > of_web > 60  # CHAT_MAX_WAIT_SECONDS
    grace = seconds(OURS["worker"]["environment"]["WORKER_GRACE_SECONDS"])
    assert seconds(OURS["worker"]["stop_grace_period"]) > grace + 5

    web, worker = (
        unit(ROOT / f"deploy/systemd/botrealm-{n}.service")["Service"] for n in ("web", "worker@")
    )
    assert (
        float(web["TimeoutStopSec"])
        > after(web["ExecStart"].split(), "--timeout-graceful-shutdown")
        > 60
    )
    grace = float(
        re.findall(
            r"^Environment=WORKER_GRACE_SECONDS=(\d+)$",
            (ROOT / "deploy/systemd/botrealm-worker@.service").read_text(),
            re.M,
        )[0]
    )
    assert float(worker["TimeoutStopSec"]) > grace + 5


def test_what_is_not_the_products_own_is_kept_and_limited() -> None:
    assert "noeviction" in SERVICES["redis"]["command"][-1]
    for name, service in SERVICES.items():
        one_shot = name in ("migrate", "homeserver-config")
        assert service["restart"] == ("no" if one_shot else "unless-stopped")
    for service in (*OURS.values(), SERVICES["postgres"], SERVICES["redis"]):
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
    for service in SERVICES.values():
        assert service["security_opt"] == ["no-new-privileges:true"]
    for service in SERVICES.values():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
        assert {volume.split(":")[0] for volume in service.get("volumes", [])} <= set(
            COMPOSE["volumes"]
        )


# Which container may know what. DATABASE_URL and REDIS_URL carry a password of their own.
SHARED = {"SECRETS_KEY", "POSTGRES_PASSWORD", "REDIS_PASSWORD"}
SECRETS = {
    "migrate": SHARED,
    "web": SHARED | {"SECRET_KEY", "REALM_SECRET_SEED", "METRICS_TOKEN"},
    "worker": SHARED | {"OPENAI_API_KEY", "AGENT_WEBHOOK_SECRET"},
    "bot": SHARED | {"BOT_RUNNER_PASSWORD"},
    "postgres": {"POSTGRES_PASSWORD"},
    "redis": {"REDIS_PASSWORD"},
}


def known_secrets(service: dict[str, Any]) -> set[str]:
    """The variables of .env whose value reaches the container; `${NAME:+word}` carries none of it."""
    values = " ".join(map(str, service.get("environment", {}).values()))
    return set(re.findall(r"\$\{([A-Z_]+)(?!:\+)(?=[}:])", values)) & set.union(*SECRETS.values())


@pytest.mark.parametrize("name", SERVICES)
def test_a_container_gets_its_own_secrets_and_no_others(name: str) -> None:
    assert known_secrets(SERVICES[name]) == SECRETS.get(name, set())
    assert SERVICES[name].get("env_file", "settings.env") == "settings.env"


def test_the_settings_of_all_containers_hold_no_secret() -> None:
    shared = (ROOT / "deploy/settings.env.example").read_text()
    assert not set(re.findall(r"^([A-Z_]+)=", shared, re.M)) & set.union(*SECRETS.values())


def test_no_password_is_an_argument_of_a_process() -> None:
    for service in SERVICES.values():
        assert not re.search(
            r"(?<!\$)\$\{?[A-Z_]*(PASSWORD|SECRET|KEY)", str(service.get("command", ""))
        )


class TestPinningImages:
    DIGEST = f"sha256:{'0a' * 32}"

    def test_pins_each_image_that_has_a_tag(self) -> None:
        for text in (DOCKERFILE, (ROOT / "compose.yaml").read_text()):
            once = pin_images.pinned(text, lambda image: self.DIGEST)
            images = re.findall(r"^(?: *image: |FROM )(\S+:\S+)", once, re.M)
            assert images
            assert all(image.endswith(f"@{self.DIGEST}") for image in images)

    def test_pins_anew_what_is_pinned(self) -> None:
        asked: list[str] = []

        def digest(image: str) -> str:
            asked.append(image)
            return f"sha256:{'1b' * 32}"

        text = pin_images.pinned("FROM python:3.11-slim-bookworm AS build\n", lambda _: self.DIGEST)
        assert pin_images.pinned(text, digest) == (
            f"FROM python:3.11-slim-bookworm@sha256:{'1b' * 32} AS build\n"
        )
        assert asked == ["python:3.11-slim-bookworm"]
