"""The settings of production: what Django and a browser make of them."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.config.test_settings import ROOT, inherited

PRODUCTION = {
    "DEBUG": "false",
    "SECRET_KEY": "tests-only-0123456789-abcdefghijklmnopqrstuvwxyz-0123456789",
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


def get(path: str, *, environment: dict[str, str] | None = None, **extra: object) -> str:
    """The status line, the headers and the body of an answer, as a server with these settings gives
    it."""
    source = f"""
import django; django.setup()
from django.test import Client
answer = Client(HTTP_HOST="bots.example.org").get({path!r}, **{extra!r})
print(answer.status_code, *(f"{{k}}: {{v}}" for k, v in answer.headers.items()), sep="\\n")
print(b"".join(answer).decode())
"""
    return python("-c", source, **(environment or {}))


def test_django_has_nothing_to_say_about_a_deployment() -> None:
    told = python("manage.py", "check", "--deploy", "--fail-level", "WARNING")

    assert "no issues" in told


def test_plain_http_is_sent_to_https() -> None:
    answer = get("/api?x=1")

    assert answer.startswith("301")
    assert "Location: https://bots.example.org/api?x=1" in answer


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/metrics"])
def test_the_platforms_questions_are_not(path: str) -> None:
    assert not get(path).startswith("301")


def test_a_proxy_that_was_asked_by_https_is_believed_when_it_is_named() -> None:
    answer = get("/api", HTTP_X_FORWARDED_PROTO="https")
    assert answer.startswith("200")
    for header in (
        "Strict-Transport-Security: max-age=2592000",
        "X-Content-Type-Options: nosniff",
        "Referrer-Policy: same-origin",
        "X-Frame-Options: DENY",
        "Permissions-Policy: camera=()",
    ):
        assert header in answer

    unnamed = {"SECURE_PROXY_SSL_HEADER": ""}
    assert get("/api", environment=unnamed, HTTP_X_FORWARDED_PROTO="https").startswith("301")


def test_without_https_nothing_depends_on_it() -> None:
    answer = get("/admin/login/", environment={"HTTPS": "false", "SECURE_PROXY_SSL_HEADER": ""})

    assert answer.startswith("200")
    assert "Strict-Transport-Security" not in answer


def test_the_admins_files_are_served_with_and_without_being_collected(tmp_path: Path) -> None:
    environment = {"STATIC_ROOT": str(tmp_path / "static"), "HTTPS": "false"}
    assert styles(environment) == {"/static/unfold/css/styles.css"}

    python("manage.py", "collectstatic", "--no-input", **environment)
    [name] = styles(environment)
    assert re.fullmatch(r"/static/unfold/css/styles\.[0-9a-f]{12}\.css", name)
    answer = get(name, environment=environment)
    assert answer.startswith("200")
    assert "immutable" in answer


def styles(environment: dict[str, str]) -> set[str]:
    """The style sheet of the admin's front page, which is there."""
    found = re.findall(
        r'href="(/static/unfold/css/styles\.[^"]*)"', get("/admin/login/", environment=environment)
    )
    assert found
    for name in found:
        assert get(name, environment=environment).startswith("200")
    return set(found)
