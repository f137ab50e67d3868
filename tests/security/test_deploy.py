"""The settings of production: what Django, a browser and a stranger make of them; what listens where;
what is known of the packages. tests/openapi compares the API with its description."""

import configparser
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import yaml

from scripts import audit, homeserver
from tests.config.starting import ROOT, inherited

PRODUCTION = {
    "DEBUG": "false",
    "SECRET_KEY": "tests-only-0123456789-abcdefghijklmnopqrstuvwxyz-0123456789",
    "SECRETS_KEY": "tests-only-5432109876-mnopqrstuvwxyzabcdefghijkl-5432109876",
    "REALM_SECRET_SEED": "tests-only-9876543210-zyxwvutsrqponmlkjihgfedcba-9876543210",
    "ALLOWED_HOSTS": "bots.example.org",
    "CHAT_ALLOW_ANONYMOUS": "",
    "HTTPS": "",
    "SECURE_HSTS_SECONDS": "",
    "SECURE_PROXY_SSL_HEADER": "X-Forwarded-Proto",
    "OPENAI_API_KEY": "sk-tests-only",
    "DATABASE_URL": "sqlite://:memory:",
    "DJANGO_SETTINGS_MODULE": "config.settings",
}


def python(*arguments: str, **environment: str) -> str:
    process = subprocess.run(
        [sys.executable, "-W", "error", *arguments],
        env=inherited() | PRODUCTION | environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout + process.stderr


SERVER = """
import json, sys
import django; django.setup()
from django.test import Client
client = Client(raise_request_exception=False, HTTP_HOST="bots.example.org")
for line in sys.stdin:
    asked = json.loads(line)
    if code := asked.pop("before", ""):
        exec(code)
    client.cookies.clear()
    answer = client.generic(asked.pop("method"), asked.pop("path"), **asked)
    cookies = {name: dict(cookie) for name, cookie in answer.cookies.items()}
    body = b"".join(answer).decode()
    told = {"status": answer.status_code, "headers": dict(answer.headers), "cookies": cookies}
    print(json.dumps(told | {"body": body}), flush=True)
"""


class Production:
    """A server with these settings, which answers what it is asked."""

    def __init__(self, **environment: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-W", "error", "-c", SERVER],
            env=inherited() | PRODUCTION | environment,
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def ask(self, path: str, method: str = "GET", **extra: str) -> dict[str, Any]:
        assert self._process.stdin
        assert self._process.stdout
        asked = {"method": method, "path": path, "REMOTE_ADDR": "203.0.113.9", **extra}
        print(json.dumps(asked), file=self._process.stdin, flush=True)
        return cast("dict[str, Any]", json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        self._process.communicate(timeout=60)


@pytest.fixture(scope="module")
def production() -> Iterator[Production]:
    server = Production()
    yield server
    server.close()


SECURE = {"HTTP_X_FORWARDED_PROTO": "https"}  # as the proxy says


def test_django_has_nothing_to_say_about_a_deployment() -> None:
    result = python("manage.py", "check", "--deploy", "--fail-level", "WARNING")

    assert "no issues" in result


def test_plain_http_is_sent_to_https(production: Production) -> None:
    answer = production.ask("/api?x=1")

    assert answer["status"] == 301
    assert answer["headers"]["Location"] == "https://bots.example.org/api?x=1"


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/metrics"])
def test_the_platforms_questions_are_not(production: Production, path: str) -> None:
    assert production.ask(path)["status"] != 301


def test_a_proxy_that_was_asked_by_https_is_believed_when_it_is_named(
    production: Production,
) -> None:
    answer = production.ask("/api", **SECURE)
    assert answer["status"] == 200
    for name, value in (
        ("Strict-Transport-Security", "max-age=2592000"),
        ("X-Content-Type-Options", "nosniff"),
        ("Referrer-Policy", "same-origin"),
        ("X-Frame-Options", "DENY"),
        ("Cross-Origin-Opener-Policy", "same-origin"),
    ):
        assert answer["headers"][name] == value
    assert "camera=()" in answer["headers"]["Permissions-Policy"]

    unnamed = Production(SECURE_PROXY_SSL_HEADER="")
    assert unnamed.ask("/api", **SECURE)["status"] == 301
    unnamed.close()


def test_cookies_go_over_https_alone(production: Production) -> None:
    cookie = production.ask("/login", **SECURE)["cookies"]["csrftoken"]
    assert (cookie["secure"], cookie["samesite"]) == (True, "Lax")


ORIGINS = [
    *("https://evil.example", "null", "http://bots.example.org", "https://evilbots.example.org"),
    *("https://bots.example.org.evil.example", "https://bots.example.org:444"),
]


@pytest.mark.parametrize("path", ["/api/chat/models", "/_bot-registrations", "/api/threads", "/"])
def test_no_other_site_is_let_read_an_answer(production: Production, path: str) -> None:
    for origin in ORIGINS:
        wish = {"HTTP_ACCESS_CONTROL_REQUEST_METHOD": "POST"}
        for answer in (
            production.ask(path, HTTP_ORIGIN=origin, **SECURE),
            production.ask(path, "OPTIONS", HTTP_ORIGIN=origin, **wish, **SECURE),
        ):
            allowed = [name for name in answer["headers"] if name.startswith("Access-Control")]
            assert not allowed


@pytest.mark.parametrize(
    ("path", "statuses"),
    [
        ("/metrics", {403}),
        ("/healthz/deep", {403}),
        ("/admin/", {302}),
        ("/admin/agents/run/", {302}),
        ("/admin/system/", {302}),
        ("/api/chat/threads", {401}),
        ("/_bot-registrations", {401}),
        ("/", {302}),
        ("/flower", {404}),
        ("/__debug__/", {404}),
        ("/.env", {404}),
        ("/.git/config", {404}),
        ("/static/../config/settings.py", {404}),
        ("/static/%2e%2e/config/settings.py", {404}),
        ("/static//etc/passwd", {404}),
    ],
)
def test_a_stranger_is_told_nothing(production: Production, path: str, statuses: set[int]) -> None:
    answer = production.ask(path, **SECURE)
    assert answer["status"] in statuses
    assert PRODUCTION["SECRET_KEY"] not in answer["body"]


@pytest.mark.parametrize("path", ["/login", "/api/chat/models", "/_bot-registrations", "/nothing"])
def test_a_defect_shows_no_page_of_djangos_own(production: Production, path: str) -> None:
    broken = (
        "from django.contrib.auth.middleware import AuthenticationMiddleware as A;"
        "kept = A.process_request;"
        "A.process_request = lambda *args: 1 / 0"
    )
    mended = "A.process_request = kept"
    answer = production.ask(path, before=broken, **SECURE)
    after = production.ask("/api", before=mended, **SECURE)
    assert answer["status"] == 500
    for word in ("Traceback", "ZeroDivisionError", "DEBUG", "settings", "Django"):
        assert word not in answer["body"]
    assert after["status"] == 200


def test_without_https_nothing_depends_on_it() -> None:
    server = Production(HTTPS="false", SECURE_PROXY_SSL_HEADER="")
    answer = server.ask("/admin/login/")
    server.close()

    assert answer["status"] == 200
    assert "Strict-Transport-Security" not in answer["headers"]


def test_the_admins_files_are_served_with_and_without_being_collected(tmp_path: Path) -> None:
    environment = {"STATIC_ROOT": str(tmp_path / "static"), "HTTPS": "false"}
    name, headers = style(environment)
    assert re.fullmatch(r"/static/unfold/css/styles\.css", name)
    assert "public" in headers["Cache-Control"]
    assert "no-store" not in headers["Cache-Control"]

    python("manage.py", "collectstatic", "--no-input", **environment)

    name, headers = style(environment)
    assert re.fullmatch(r"/static/unfold/css/styles\.[0-9a-f]{12}\.css", name)
    assert "immutable" in headers["Cache-Control"]


def style(environment: dict[str, str]) -> tuple[str, dict[str, str]]:
    """The style sheet of the admin's front page, which is there, and the headers that come with it."""
    server = Production(**environment)
    page = server.ask("/admin/login/")["body"]
    [name] = set(re.findall(r'href="(/static/unfold/css/styles\.[^"]*)"', page))
    answer = server.ask(name)
    server.close()
    assert answer["status"] == 200
    return name, answer["headers"]


@pytest.fixture
def stack() -> configparser.RawConfigParser:
    found = configparser.RawConfigParser(inline_comment_prefixes=(";",))
    found.read(ROOT / "deploy/local/supervisord.conf")
    return found


class TestWhatListens:
    """By default on this machine only."""

    def test_the_local_stack(self, stack: configparser.RawConfigParser) -> None:
        assert "--host 127.0.0.1 " in stack["program:web"]["command"]
        assert "--no-proxy-headers" in stack["program:web"]["command"]
        forward = (ROOT / "scripts/forward.py").read_text()
        assert re.findall(r"Server\(\((.*?),", forward) == ['"127.0.0.1"']

    def test_what_steers_it_is_its_owners(self, stack: configparser.RawConfigParser) -> None:
        assert "inet_http_server" not in stack
        assert stack["unix_http_server"]["chmod"] == "0600"

    def test_redis_and_the_homeserver(self) -> None:
        redis = (ROOT / "deploy/local/redis.conf").read_text().splitlines()
        assert [line for line in redis if line.startswith("bind ")] == ["bind 127.0.0.1"]
        assert "requirepass $password" in redis
        assert not [line for line in redis if line.startswith("protected-mode")]
        matrix = homeserver.configuration(Path("/nowhere"), 8008, {})
        assert {tuple(each["bind_addresses"]) for each in matrix["listeners"]} == {("127.0.0.1",)}

    def test_containers_and_units(self) -> None:
        services = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]
        ports = [port for each in services.values() for port in each.get("ports", [])]
        assert ports
        assert all(str(port).startswith("127.0.0.1:") for port in ports)
        unit = (ROOT / "deploy/systemd/botrealm-web.service").read_text()
        assert "--host 127.0.0.1 " in unit


@pytest.mark.parametrize(
    ("dependencies", "output"),
    [
        ([{"name": "Django_X", "version": "1.0", "vulns": []}], []),
        ([], ["django-x was not audited"]),
        ([{"name": "django-x", "skip_reason": "not found"}], ["django-x was not audited"]),
        ([{"name": "django-x", "version": "2.0", "vulns": []}], ["django-x was not audited"]),
        (
            [{"name": "django-x", "version": "1.0", "vulns": [{"id": "CVE-1"}]}],
            ["django-x 1.0 has CVE-1"],
        ),
    ],
)
def test_what_was_not_audited_is_not_taken_for_sound(
    dependencies: list[dict[str, Any]], output: list[str]
) -> None:
    assert audit.findings({"dependencies": dependencies}, {"django-x": "1.0"}) == output
    assert len(audit.locked()) > 100


LOCKED = {"base.in": "base.txt", "dev.in": "dev.txt", "redis.in": "redis.txt"} | {
    "homeserver.in": "homeserver.txt"
}
REQUIREMENTS = ROOT / "requirements"


@pytest.mark.parametrize(("wanted", "lock"), LOCKED.items())
def test_the_lock_has_each_requirement_at_its_version(wanted: str, lock: str) -> None:
    locked = set(audit.PINNED.findall((REQUIREMENTS / lock).read_text()))
    required = set(audit.PINNED.findall((REQUIREMENTS / wanted).read_text()))

    assert required
    assert required <= locked, "run make lock"


@pytest.mark.parametrize("lock", LOCKED.values())
def test_each_locked_package_has_its_hashes(lock: str) -> None:
    entries = re.split(r"^(?=[A-Za-z0-9])", (REQUIREMENTS / lock).read_text(), flags=re.M)[1:]

    assert len(entries) > 20
    assert [each.split()[0] for each in entries if "--hash=sha256:" not in each] == []


def test_the_locks_agree_on_every_version() -> None:
    versions: dict[str, set[str]] = {}
    for lock in LOCKED.values():
        for name, version in audit.PINNED.findall((REQUIREMENTS / lock).read_text()):
            versions.setdefault(name, set()).add(version)

    assert {name: each for name, each in versions.items() if len(each) > 1} == {}
