"""The System page: processes, versions, settings and problems.

Each section checks one part with a timeout: a part that does not answer does not affect the others.
"""

import os
import platform
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import import_module, metadata
from typing import Any

import django
import httpx2
from django.conf import ENVIRONMENT_VARIABLE, global_settings, settings
from django.contrib import admin
from django.core import checks
from django.core.exceptions import PermissionDenied
from django.db import DatabaseError, connection
from django.http import HttpRequest, HttpResponse
from django.shortcuts import render
from django.template.defaultfilters import filesizeformat
from redis.exceptions import RedisError

from agents.events import stream
from botrunner.models import Session
from console import processes
from ops import doctor
from ops.doctor import BROKEN, OK, WARN

PATIENCE_SECONDS = 1.5
PACKAGES = [
    "celery",
    "redis",
    "openai",
    "matrix-nio",
    "djangorestframework",
    "djangorestframework-jsonapi",
    "django-unfold",
    "django-axes",
    "django-otp",
    "psycopg",
    "uvicorn",
]
# The Django settings that an operator needs.
DJANGO_SETTINGS = {
    "ALLOWED_HOSTS",
    "CSRF_TRUSTED_ORIGINS",
    "DATABASES",
    "DATA_UPLOAD_MAX_MEMORY_SIZE",
    "DEBUG",
    "FORCE_SCRIPT_NAME",
    "SECRET_KEY",
    "SECURE_HSTS_SECONDS",
    "SECURE_PROXY_SSL_HEADER",
    "SECURE_SSL_REDIRECT",
    "SESSION_COOKIE_SECURE",
    "STATIC_ROOT",
    "TIME_ZONE",
}
# Settings that the environment does not change.
INTERNAL = re.compile(
    r"(UNFOLD|REST_FRAMEWORK|JSON_API|LOGGING|BASE_DIR|WSGI|.*_(CALLABLE|HANDLER)$)"
)
SECRET = re.compile(r"(KEY|SECRET|PASSWORD|PASS|TOKEN|SEED|DSN|CREDENTIALS?)\Z", re.IGNORECASE)
PUBLIC = {"REDIS_STREAM_KEY"}
MANY_UNREAD = 1000


@dataclass
class Item:
    name: str
    value: Any
    state: str = ""
    hint: str = ""


@dataclass
class Section:
    title: str
    items: list[Item] = field(default_factory=list)
    failure: str = ""


def page(request: HttpRequest) -> HttpResponse:
    if not request.user.has_perm("console.see_system"):
        raise PermissionDenied
    # The doctor runs on POST only: it tries the bot's password and takes seconds.
    chosen = {"Doctor": _doctor} | SECTIONS if request.method == "POST" else SECTIONS
    context = {
        **admin.site.each_context(request),
        "title": "System",
        "sections": check_sections(chosen),
    }
    return render(request, "console/system.html", context)


def check_sections(section_checks: "Checks") -> list[Section]:
    return [_section(title, check) for title, check in section_checks.items()]


def _section(title: str, check: Callable[[], Iterator[Item]]) -> Section:
    section = Section(title)
    try:
        section.items.extend(check())
    except RedisError as error:
        section.failure = f"Redis is unavailable: {settings.SCRUBBER(str(error))}"
    except httpx2.HTTPError as error:
        section.failure = (
            f"The homeserver at {settings.SCRUBBER(settings.MATRIX_URL)} does not answer: "
            f"{type(error).__name__}."
        )
    except DatabaseError as error:
        section.failure = f"The database failed: {error}"
    return section


def _doctor() -> Iterator[Item]:
    """Run the checks of `manage.py doctor`; takes at most ten seconds."""
    for each in doctor.examine():
        yield _line(each.check, (each.level, each.message, each.fix))


def _line(name: str, finding: tuple[str, str, str]) -> Item:
    level, text, fix = finding
    return Item(name, settings.SCRUBBER(text), level, settings.SCRUBBER(fix))


def _findings() -> Iterator[Item]:
    """Run Django's system checks, including those for deployments."""
    messages = checks.run_checks(include_deployment_checks=not settings.DEBUG)
    warnings = [message for message in messages if not message.is_silenced()]
    for message in warnings:
        state = BROKEN if message.level >= checks.ERROR else WARN
        yield Item(message.id or "", message.msg, state, message.hint or "")
    if not warnings:
        yield Item("Checks", "No problems found.", OK)


def _processes() -> Iterator[Item]:
    for each in (*processes.workers(), *processes.bots()):
        state = {"good": OK, "bad": BROKEN}.get(each.mood, "")
        yield Item(each.name, f"{each.kind}: {each.state}; {each.note}", state)
    if not Session.objects.exists():
        yield Item("Bot", "The bot has never logged in.", WARN, "Start it: python manage.py runbot")


def _versions() -> Iterator[Item]:
    yield Item("Python", platform.python_version())
    yield Item("Django", django.get_version())
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT sqlite_version()" if connection.vendor == "sqlite" else "SHOW server_version"
        )
        yield Item(connection.display_name, cursor.fetchone()[0])
    for package in PACKAGES:
        try:
            yield Item(package, metadata.version(package))
        except metadata.PackageNotFoundError:
            continue


def _migrations() -> Iterator[Item]:
    return (_line("Migrations", each) for each in doctor.migrations())


def _homeserver() -> Iterator[Item]:
    with httpx2.Client(base_url=settings.MATRIX_URL, timeout=PATIENCE_SECONDS) as client:
        response = client.get("/_matrix/client/versions")
        response.raise_for_status()
        yield Item("Client API", ", ".join(_json(response).get("versions", [])[-3:]) or "?", OK)
        server = _json(client.get("/_matrix/federation/v1/version")).get("server", {})
        if server:
            yield Item(server.get("name", "Server"), server.get("version", "?"))


def _json(response: httpx2.Response) -> dict[str, Any]:
    try:
        value = response.json()
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _redis() -> Iterator[Item]:
    info: dict[str, Any] = stream.probe_client().info()
    for finding in doctor.redis_server(info):
        yield _line("Redis", finding)
    limit = f"of {filesizeformat(info['maxmemory'])}" if info.get("maxmemory") else "no limit"
    yield Item("Memory", f"{filesizeformat(info['used_memory'])}, {limit}")
    figures = stream.stats()
    yield Item(f"Stream {settings.REDIS_STREAM_KEY}", f"{figures.length} entries")
    for group in figures.groups:
        unread = "unknown" if group.unread is None else group.unread
        late = group.unread is not None and group.unread > MANY_UNREAD
        text = f"{unread} unread, {group.pending} unacknowledged"
        yield Item(f"Group {group.name}", text, WARN if late else OK)
    yield Item("Dead letters", figures.dead, WARN if figures.dead else OK)
    yield Item("Celery queue", figures.queued)


def _settings() -> Iterator[Item]:
    for name in sorted(vars(import_module(os.environ[ENVIRONMENT_VARIABLE]))):
        is_own = name.isupper() and not hasattr(global_settings, name) and not INTERNAL.match(name)
        if is_own or name in DJANGO_SETTINGS:
            yield Item(name, masked(name, getattr(settings, name)))


def masked(name: str, value: Any) -> Any:
    """Return the value of a setting with secrets (by name) and passwords in URLs masked."""
    if isinstance(value, dict):
        return {key: masked(str(key), each) for key, each in value.items()}
    if isinstance(value, list | tuple | set):
        return [masked(name, each) for each in value]
    if SECRET.search(name) and name not in PUBLIC:
        return "•••• (set)" if value else "not set"
    return settings.SCRUBBER(value) if isinstance(value, str) else value


Checks = dict[str, Callable[[], Iterator[Item]]]
SECTIONS: Checks = {
    "Findings": _findings,
    "Processes": _processes,
    "Redis": _redis,
    "Homeserver": _homeserver,
    "Migrations": _migrations,
    "Versions": _versions,
    "Settings": _settings,
}
