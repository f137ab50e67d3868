"""The page that tells what runs, in which version, with which settings, and what is wrong with it.

Each part looks for itself and is cut short: a part that finds nobody says so and leaves the others be.
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
# Of Django's own settings those that an operator asks for.
DJANGOS = {
    "ALLOWED_HOSTS",
    "CSRF_TRUSTED_ORIGINS",
    "DATABASES",
    "DATA_UPLOAD_MAX_MEMORY_SIZE",
    "DEBUG",
    "SECRET_KEY",
    "SECURE_HSTS_SECONDS",
    "SECURE_PROXY_SSL_HEADER",
    "SECURE_SSL_REDIRECT",
    "SESSION_COOKIE_SECURE",
    "STATIC_ROOT",
    "TIME_ZONE",
}
# How the program is put together; nothing of it is set from outside.
PROGRAM = re.compile(
    r"(UNFOLD|REST_FRAMEWORK|JSON_API|LOGGING|BASE_DIR|WSGI|.*_(CALLABLE|HANDLER)$)"
)
SECRET = re.compile(r"(KEY|SECRET|PASSWORD|PASS|TOKEN|SEED|DSN|CREDENTIALS?)\Z", re.IGNORECASE)
NO_SECRET = {"REDIS_STREAM_KEY"}
MANY_UNREAD = 1000


@dataclass
class Line:
    name: str
    value: Any
    state: str = ""
    hint: str = ""


@dataclass
class Part:
    title: str
    lines: list[Line] = field(default_factory=list)
    failure: str = ""


def page(request: HttpRequest) -> HttpResponse:
    if not request.user.has_perm("console.see_system"):
        raise PermissionDenied
    # By POST: it tries the bot's password, and takes its time.
    found = parts({"Doctor": _examination} | PARTS if request.method == "POST" else PARTS)
    context = {**admin.site.each_context(request), "title": "System", "parts": found}
    return render(request, "console/system.html", context)


def parts(looks: "Looks") -> list[Part]:
    return [_look(title, look) for title, look in looks.items()]


def _look(title: str, look: Callable[[], Iterator[Line]]) -> Part:
    part = Part(title)
    try:
        part.lines.extend(look())
    except RedisError as error:
        part.failure = f"Redis does not answer: {settings.SCRUBBER(str(error))}"
    except httpx2.HTTPError as error:
        part.failure = (
            f"The homeserver at {settings.SCRUBBER(settings.MATRIX_URL)} does not answer: "
            f"{type(error).__name__}."
        )
    except DatabaseError as error:
        part.failure = f"The database refuses: {error}"
    return part


def _examination() -> Iterator[Line]:
    """What `manage.py doctor` says, in its words; it takes no longer than ten seconds."""
    for found in doctor.examine():
        yield _line(found.check, (found.level, found.said, found.mend))


def _line(name: str, finding: tuple[str, str, str]) -> Line:
    level, said, mend = finding
    return Line(name, settings.SCRUBBER(said), level, settings.SCRUBBER(mend))


def _findings() -> Iterator[Line]:
    """What Django's system checks say, those for a deployment included."""
    messages = checks.run_checks(include_deployment_checks=not settings.DEBUG)
    found = [message for message in messages if not message.is_silenced()]
    for message in found:
        state = BROKEN if message.level >= checks.ERROR else WARN
        yield Line(message.id or "", message.msg, state, message.hint or "")
    if not found:
        yield Line("Checks", "Nothing to complain of.", OK)


def _processes() -> Iterator[Line]:
    for each in (*processes.workers(), *processes.bots()):
        state = {"good": OK, "bad": BROKEN}.get(each.mood, "")
        yield Line(each.name, f"{each.kind}: {each.state}; {each.note}", state)
    if not Session.objects.exists():
        yield Line("Bot", "It has never logged in.", WARN, "Start it: python manage.py runbot")


def _versions() -> Iterator[Line]:
    yield Line("Python", platform.python_version())
    yield Line("Django", django.get_version())
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT sqlite_version()" if connection.vendor == "sqlite" else "SHOW server_version"
        )
        yield Line(connection.display_name, cursor.fetchone()[0])
    for package in PACKAGES:
        try:
            yield Line(package, metadata.version(package))
        except metadata.PackageNotFoundError:
            continue


def _migrations() -> Iterator[Line]:
    return (_line("Migrations", each) for each in doctor.migrations())


def _homeserver() -> Iterator[Line]:
    with httpx2.Client(base_url=settings.MATRIX_URL, timeout=PATIENCE_SECONDS) as client:
        answer = client.get("/_matrix/client/versions")
        answer.raise_for_status()
        yield Line("Client API", ", ".join(_json(answer).get("versions", [])[-3:]) or "?", OK)
        server = _json(client.get("/_matrix/federation/v1/version")).get("server", {})
        if server:
            yield Line(server.get("name", "Server"), server.get("version", "?"))


def _json(answer: httpx2.Response) -> dict[str, Any]:
    try:
        found = answer.json()
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _redis() -> Iterator[Line]:
    info: dict[str, Any] = stream.probe_client().info()
    for finding in doctor.redis_server(info):
        yield _line("Redis", finding)
    most = f"of {filesizeformat(info['maxmemory'])}" if info.get("maxmemory") else "no limit"
    yield Line("Memory", f"{filesizeformat(info['used_memory'])}, {most}")
    figures = stream.stats()
    yield Line(f"Stream {settings.REDIS_STREAM_KEY}", f"{figures.length} entries")
    for group in figures.groups:
        unread = "unknown" if group.unread is None else group.unread
        late = group.unread is not None and group.unread > MANY_UNREAD
        text = f"{unread} not read, {group.pending} not acknowledged"
        yield Line(f"Group {group.name}", text, WARN if late else OK)
    yield Line("Dead letters", figures.dead, WARN if figures.dead else OK)
    yield Line("Celery's queue", figures.queued)


def _settings() -> Iterator[Line]:
    for name in sorted(vars(import_module(os.environ[ENVIRONMENT_VARIABLE]))):
        ours = name.isupper() and not hasattr(global_settings, name) and not PROGRAM.match(name)
        if ours or name in DJANGOS:
            yield Line(name, masked(name, getattr(settings, name)))


def masked(name: str, value: Any) -> Any:
    """The value without what must not be seen: secrets by their names, passwords in URLs."""
    if isinstance(value, dict):
        return {key: masked(str(key), each) for key, each in value.items()}
    if isinstance(value, list | tuple | set):
        return [masked(name, each) for each in value]
    if SECRET.search(name) and name not in NO_SECRET:
        return "•••• (set)" if value else "not set"
    return settings.SCRUBBER(value) if isinstance(value, str) else value


Looks = dict[str, Callable[[], Iterator[Line]]]
PARTS: Looks = {
    "Findings": _findings,
    "Processes": _processes,
    "Redis": _redis,
    "Homeserver": _homeserver,
    "Migrations": _migrations,
    "Versions": _versions,
    "Settings": _settings,
}
