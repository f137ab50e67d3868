"""Diagnose the setup from the point of view of this process.

Checks are independent, limited to ten seconds each, and leave no change behind.
"""

import os
import socket
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import Any

import httpx2
from celery import current_app
from django.conf import settings
from django.contrib.staticfiles import finders
from django.core import checks
from django.db import DatabaseError, connection, transaction
from django.db.migrations.recorder import MigrationRecorder
from django.utils import timezone
from redis.exceptions import RedisError

from agents.events import stream
from agents.llm import completions
from agents.models import Run, Worker
from botrunner.models import Session
from lib import files, postgresql
from lib.redis import why
from lib.secrets import Unreadable
from lib.timeouts import BoundedCheck, CheckFailed, run_checks
from ops import health, local, secrets_at_rest
from webhooks.models import Delivery, Subscription

OK, WARN, BROKEN = "ok", "warn", "broken"
PATIENCE_SECONDS = 10.0
HTTP_SECONDS = 4.0
CLIENT = "/_matrix/client/v3"
CLOCK_WARN_SECONDS, CLOCK_BROKEN_SECONDS = 5.0, 60.0
MIN_REDIS = (6, 2)  # XAUTOCLAIM, XTRIM MINID
MIN_POSTGRESQL = 14
DEAD_FOR = timedelta(days=7)
# System checks that are covered by a more precise check below.
COVERED_ELSEWHERE = {"botrealm.W001"}


@dataclass(frozen=True)
class Finding:
    check: str
    level: str
    message: str
    fix: str = ""

    def as_json(self) -> dict[str, str]:
        return {"check": self.check, "level": self.level, "message": self.message, "fix": self.fix}


Findings = Iterator[tuple[str, str, str]]  # level, message, fix


def examine() -> list[Finding]:
    """Return all findings, in the order of the checks."""
    questions = {name: BoundedCheck(_listed(check)) for name, check in CHECKS.items()}
    return [
        Finding(name, *each)
        for name, answer in run_checks(questions, PATIENCE_SECONDS).items()
        for each in ([_failed(name, answer)] if isinstance(answer, CheckFailed) else answer)
    ]


def _failed(name: str, failure: CheckFailed) -> tuple[str, str, str]:
    if not failure.reason.startswith("DATABASE_URL"):
        return BROKEN, f"Not checked: {failure.reason}", "See the other findings, and the log."
    if name == "database":
        return (
            BROKEN,
            failure.reason,
            "Check DATABASE_URL, and that PostgreSQL runs and accepts it.",
        )
    return BROKEN, "Not checked: the database is unavailable.", "Repair the database first."


def _listed(check: Callable[[], Findings]) -> Callable[[], list[tuple[str, str, str]]]:
    return lambda: list(check())


def _settings() -> Findings:
    built_in = [
        name
        for name in ("SECRET_KEY", "REALM_SECRET_SEED")
        if getattr(settings, name) == settings.DEVELOPMENT_SECRET
    ]
    open_to = set(settings.ALLOWED_HOSTS) - {"localhost", "127.0.0.1", "[::1]"}
    if settings.DEBUG and open_to:
        yield (
            BROKEN,
            f"DEBUG is on, and ALLOWED_HOSTS accepts other hosts: {', '.join(sorted(open_to))}.",
            "Set DEBUG=false, SECRET_KEY and REALM_SECRET_SEED.",
        )
    elif settings.DEBUG:
        yield OK, "DEBUG is on, for this machine only.", ""
    else:
        yield OK, f"DEBUG is off; allowed hosts: {', '.join(settings.ALLOWED_HOSTS) or 'none'}.", ""
    if built_in and not settings.DEBUG:
        yield BROKEN, f"Default value of {' and '.join(built_in)}.", "Set 50 random characters."
    if not settings.DEBUG and settings.BOT_RUNNER_PASSWORD == "password":  # noqa: S105
        yield (
            WARN,
            "BOT_RUNNER_PASSWORD has its default value.",
            "Give the bot's account a strong password, and set it here.",
        )
    for message in checks.run_checks(tags=["botrealm"]):
        if message.id not in COVERED_ELSEWHERE:
            level = BROKEN if message.level >= checks.ERROR else WARN
            yield level, message.msg, message.hint or ""
    if not settings.DEBUG and (
        found := checks.run_checks(tags=["security"], include_deployment_checks=True)
    ):
        yield (
            WARN,
            f"{len(found)} deployment checks failed.",
            "List them: python manage.py check --deploy",
        )


def _database() -> Findings:
    with connection.cursor() as cursor:
        if connection.vendor == "sqlite":
            yield from _sqlite(cursor)
        else:
            yield from _postgresql(cursor)
    yield from _database_writes()


def _database_writes() -> Findings:
    """Insert a row that is never committed."""
    recorder = MigrationRecorder(connection)
    if not recorder.has_table():
        return
    try:
        with transaction.atomic():
            recorder.migration_qs.create(app="doctor", name="probe")
            transaction.set_rollback(True)
    except DatabaseError as error:
        yield (
            BROKEN,
            f"The database refuses writes ({type(error).__name__}).",
            "Check for a full disk, a read-only file, a standby, or missing privileges.",
        )


def _sqlite(cursor: Any) -> Findings:
    cursor.execute("SELECT sqlite_version()")
    version = cursor.fetchone()[0]
    cursor.execute("PRAGMA journal_mode")
    mode = cursor.fetchone()[0]
    if mode != "wal":
        yield (
            BROKEN,
            f"SQLite {version} in journal mode {mode!r}: readers block writers.",
            "Put the file on a local disk: network file systems do not support WAL.",
        )
    elif settings.DEBUG:
        yield OK, f"SQLite {version}, WAL.", ""
    else:
        yield (
            WARN,
            f"SQLite {version}, WAL: one host only.",
            "For several hosts or many users, use PostgreSQL: DATABASE_URL=postgres://...",
        )


def _postgresql(cursor: Any) -> Findings:
    cursor.execute("SELECT current_setting('server_version'), pg_is_in_recovery()")
    version, is_standby = cursor.fetchone()
    if int(version.split(".")[0]) < MIN_POSTGRESQL:
        yield BROKEN, f"PostgreSQL {version}.", f"Version {MIN_POSTGRESQL} or later is needed."
    elif is_standby:
        yield BROKEN, "This PostgreSQL is a standby.", "Set DATABASE_URL to the primary."
    else:
        yield OK, f"PostgreSQL {version}.", ""
    yield from _guard(cursor)
    yield from _few_connections(cursor)
    cursor.execute("SELECT clock_timestamp()")
    yield from _clock("the database", cursor.fetchone()[0])


def _guard(cursor: Any) -> Findings:
    """Check that PostgreSQL ends a transaction that a frozen process holds open."""
    cursor.execute(
        "SELECT setting::int, current_user FROM pg_settings"
        " WHERE name = 'idle_in_transaction_session_timeout'"
    )
    milliseconds, user = cursor.fetchone()
    mode = settings.DATABASE_PGBOUNCER
    if milliseconds:
        yield from [(OK, f"Through PgBouncer, pool_mode {mode}.", "")] if mode else []
        return
    yield (
        WARN,
        "Transactions of a frozen process are never ended: its locks stop all others. "
        "idle_in_transaction_session_timeout is 0"
        + (", as PgBouncer refuses it at the start of a session." if mode else "."),
        f"Run once: ALTER ROLE \"{user}\" SET idle_in_transaction_session_timeout = '10s'; then "
        "reconnect.",
    )


def _few_connections(cursor: Any) -> Findings:
    if settings.DATABASE_PGBOUNCER:
        return
    cursor.execute(postgresql.PERMITTED)
    permitted = cursor.fetchone()[0]
    size = connection.settings_dict["OPTIONS"]["pool"]["max_size"]
    if postgresql.share(permitted) < size:
        yield (
            WARN,
            f"PostgreSQL permits this role {permitted} connections: a process opens at most "
            f"{postgresql.share(permitted)}, not {size} (DATABASE_POOL_SIZE).",
            "Raise max_connections, or the limit of the role or the database. With more than "
            f"{postgresql.PROCESSES} processes, some may find none.",
        )


def migrations() -> Findings:
    if missing := health.unapplied():
        shown = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        yield BROKEN, f"{len(missing)} not applied: {shown}.", "Run: python manage.py migrate"
    else:
        yield OK, "All applied.", ""


REDIS_FIX = "Start Redis, or set REDIS_URL. Messages are saved meanwhile, and answered later."


def _redis() -> Findings:
    """Check the connection of the event stream, and writes."""
    try:
        found = list(redis_server(stream.probe_client().info()))
        yield from found
        if BROKEN not in {level for level, _, _ in found}:
            stream.check_writable()
    except RedisError as error:
        yield BROKEN, why(error), REDIS_FIX


def _broker() -> Findings:
    """Check Celery's own connection, opened as a worker opens it: its channel writes at once."""
    timeouts = {"socket_timeout": 3, "socket_connect_timeout": 3}
    try:
        with current_app.connection_for_read(transport_options=timeouts) as broker:
            broker.connect()
    except RedisError as error:
        yield BROKEN, why(error), "Workers receive no runs meanwhile. " + REDIS_FIX
    else:
        yield OK, f"Celery is connected to {broker.as_uri()}.", ""


def redis_server(info: Mapping[str, Any]) -> Findings:
    """Judge the INFO of a Redis server."""
    version = str(info["redis_version"])
    persistence = "persistence on" if info.get("aof_enabled") else "persistence off (safe)"
    if tuple(map(int, version.split(".")[:2])) < MIN_REDIS:
        yield BROKEN, f"Redis {version}.", "Version 6.2 or later is needed."
    elif info.get("role") == "slave":
        yield BROKEN, "This Redis is a replica.", "Set REDIS_URL to the primary."
    elif info.get("redis_mode") == "cluster":
        yield BROKEN, "This Redis is a cluster.", "Use a single server, which Celery needs."
    else:
        yield OK, f"Redis {version}, {persistence}.", ""
    policy = str(info.get("maxmemory_policy", "noeviction"))
    if policy != "noeviction":
        yield (
            BROKEN if policy.startswith("allkeys") else WARN,
            f"maxmemory-policy is {policy}: a full Redis would evict the stream and the queue.",
            "Set maxmemory-policy noeviction, and use another Redis for caches.",
        )


def _workers() -> Findings:
    alive = list(Worker.objects.alive())
    reading = Worker.objects.reading().count()
    waiting = Run.objects.unfinished().count()
    if not reading:
        yield (
            WARN,
            f"No worker is running; unfinished runs: {waiting}.",
            "Run: celery -A config worker",
        )
        return
    yield OK, f"{reading} running, active runs: {sum(each.runs_in_hand for each in alive)}.", ""
    if len(versions := {each.version for each in alive}) > 1:
        yield (
            WARN,
            f"Workers run different versions: {', '.join(sorted(versions))}.",
            "Restart the old ones.",
        )


def _homeserver() -> Findings:
    session = Session.objects.filter(
        homeserver=settings.MATRIX_URL, username=settings.BOT_RUNNER_USERNAME
    ).first()
    is_expected = bool(session or os.environ.get("MATRIX_URL", "").strip())
    with httpx2.Client(base_url=settings.MATRIX_URL, timeout=HTTP_SECONDS) as client:
        try:
            versions = client.get("/_matrix/client/versions")
            versions.raise_for_status()
            latest = str(versions.json()["versions"][-1])
        except (httpx2.HTTPError, ValueError, LookupError, TypeError) as error:
            yield (
                BROKEN if is_expected else WARN,
                f"No homeserver answers at {_shown(settings.MATRIX_URL)} ({type(error).__name__}).",
                "Set MATRIX_URL. Without rooms, ignore this and run no bot runner.",
            )
            return
        yield OK, f"{_shown(settings.MATRIX_URL)} supports {latest}.", ""
        yield from _clock("the homeserver", _date(versions))
        try:
            yield from _login(client, session)
        except httpx2.HTTPError as error:
            yield WARN, f"No answer to the login ({type(error).__name__}).", "Try again later."


def _login(client: httpx2.Client, session: Session | None) -> Findings:
    """Check the stored token; if there is none, log in with the password and out again, so that no
    device remains."""
    try:
        stored = session.access_token if session else ""
    except Unreadable:
        return  # the check of secrets reports it
    if stored:
        response = client.get(f"{CLIENT}/account/whoami", headers=_bearer(stored))
        if response.status_code == 200:
            yield OK, f"The bot is logged in as {session}.", _RATE_LIMITS
        else:
            yield (
                WARN,
                f"The stored login of {session} is no longer valid ({response.status_code}).",
                "The bot runner logs in again automatically, with BOT_RUNNER_PASSWORD.",
            )
        return
    response = client.post(
        f"{CLIENT}/login",
        json={
            "type": "m.login.password",
            "identifier": {"type": "m.id.user", "user": settings.BOT_RUNNER_USERNAME},
            "password": settings.BOT_RUNNER_PASSWORD,
            "initial_device_display_name": "Botrealm doctor",
        },
    )
    if response.status_code == 429:
        yield WARN, "Login not checked: the homeserver limits its rate.", _RATE_LIMITS
    elif response.status_code != 200:
        yield (
            BROKEN,
            f"The homeserver refuses {settings.BOT_RUNNER_USERNAME} ({response.status_code}).",
            "Create the account, or set BOT_RUNNER_USERNAME and BOT_RUNNER_PASSWORD.",
        )
    else:
        token = response.json()["access_token"]
        out = client.post(f"{CLIENT}/logout", json={}, headers=_bearer(token))
        if out.status_code == 200:
            yield OK, "BOT_RUNNER_USERNAME and BOT_RUNNER_PASSWORD are valid.", _RATE_LIMITS
        else:
            yield (
                WARN,
                "The login succeeded, the logout failed.",
                "Delete the account's new device.",
            )


_RATE_LIMITS = (
    "If replies are slow, raise the bot's rate limit. Synapse: POST "
    "/_synapse/admin/v1/users/<bot>/override_ratelimit"
)


def _model() -> Findings:
    if not completions.configured():
        yield (
            WARN,
            "No model: every answer is an echo of its message.",
            "Set OPENAI_API_KEY, or OPENAI_BASE_URL for another compatible endpoint.",
        )
        return
    base = (settings.OPENAI_BASE_URL or "https://api.openai.com/v1").rstrip("/")
    headers = _bearer(settings.OPENAI_API_KEY) if settings.OPENAI_API_KEY else {}
    try:
        response = httpx2.get(f"{base}/models", headers=headers, timeout=HTTP_SECONDS)
    except httpx2.HTTPError as error:
        yield (
            BROKEN,
            f"{_shown(base)} does not answer ({type(error).__name__}).",
            "Check OPENAI_BASE_URL, and the outgoing network.",
        )
        return
    if response.status_code in (401, 403):
        yield BROKEN, f"{_shown(base)} refuses the key.", "Set a valid OPENAI_API_KEY."
    elif response.status_code != 200:
        yield (
            WARN,
            f"{_shown(base)} does not list its models ({response.status_code}).",
            "If answers arrive, ignore this. Otherwise check OPENAI_BASE_URL: many end in /v1.",
        )
    else:
        yield from _listed_models(base, response)
    yield from _clock("the model's endpoint", _date(response))


def _listed_models(base: str, response: httpx2.Response) -> Findings:
    try:
        known = {str(model["id"]) for model in response.json()["data"]}
    except (ValueError, LookupError, TypeError):
        known = set()
    configured = {settings.CHAT_DEFAULT_MODEL, *settings.CHAT_ALLOWED_MODELS}
    configured |= {settings.CHAT_SUMMARY_MODEL} - {""}
    if known and (missing := sorted(configured - known)):
        yield (
            WARN,
            f"{_shown(base)} does not know {', '.join(missing)}.",
            "Check CHAT_DEFAULT_MODEL, CHAT_ALLOWED_MODELS and CHAT_SUMMARY_MODEL. "
            f"Known models: {', '.join(sorted(known)[:8])}{', ...' if len(known) > 8 else ''}",
        )
    else:
        yield OK, f"{_shown(base)} answers; default model {settings.CHAT_DEFAULT_MODEL}.", ""


def _connections() -> Findings:
    possible, streams = files.connections(), settings.CHAT_MAX_STREAMS
    limit = min(possible, settings.WEB_MAX_CONNECTIONS or possible)
    if limit > streams:
        yield (
            OK,
            f"A web process accepts {limit} connections, of which {streams} may be streams.",
            "",
        )
        return
    yield (
        WARN,
        f"CHAT_MAX_STREAMS is {streams}, and a web process accepts {limit} connections: streams alone "
        "can use them all.",
        f"The limit of open files is {files.limit()}: raise LimitNOFILE, ulimits or ulimit -n (and "
        "WEB_MAX_CONNECTIONS, if it is set), or lower CHAT_MAX_STREAMS.",
    )


def _ports() -> Findings:
    for name, default in local.PORTS.items():
        port = int(os.environ.get(name, "").strip() or default)
        with socket.socket() as probe:
            probe.settimeout(1)
            is_taken = probe.connect_ex(("127.0.0.1", port)) == 0
        if not is_taken:
            yield OK, f"{port} is free.", ""
        elif _is_ours(port):
            yield OK, f"{port} is this server.", ""
        else:
            yield (
                WARN,
                f"{port} is taken by another program.",
                f"Run: {name}=<a free port> make run",
            )


def _is_ours(port: int) -> bool:
    try:
        url = f"http://127.0.0.1:{port}/healthz"
        response = httpx2.get(url, timeout=HTTP_SECONDS, trust_env=False)
        return bool(response.json().get("service") == "botrealm")
    except (httpx2.HTTPError, ValueError, AttributeError):
        return False


def _static() -> Findings:
    found = finders.find("admin/css/base.css") if settings.WHITENOISE_USE_FINDERS else None
    root = getattr(settings, "STATIC_ROOT", None)
    if found or (root and os.path.exists(os.path.join(root, "admin/css/base.css"))):
        yield OK, "The admin's static files are found.", ""
    else:
        yield BROKEN, "The admin has no styles.", "Run: python manage.py collectstatic"


def _metrics() -> Findings:
    folder = settings.PROMETHEUS_MULTIPROC_DIR
    if not folder:
        yield (
            OK if settings.DEBUG else WARN,
            "/metrics counts the requests of one web process only.",
            "With several, set PROMETHEUS_MULTIPROC_DIR to an empty directory on each host.",
        )
        return
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        yield BROKEN, f"{folder} is not writable: {error.strerror}.", "Make it writable."
    else:
        yield OK, "All web processes are counted.", ""


def _webhooks() -> Findings:
    enabled = list(Subscription.objects.enabled())
    yield OK, f"Enabled webhooks: {len(enabled) or 'none'}.", ""
    if refused := sorted({each.host for each in enabled if not each.is_allowed}):
        yield (
            WARN,
            f"HOOKS_ALLOWED_HOSTS does not include {', '.join(refused)}.",
            "Add the host, or disable the webhook.",
        )
    if failing := sorted({each.host for each in enabled if each.failing_since}):
        yield (
            WARN,
            f"The last delivery to {', '.join(failing)} failed.",
            "The admin's page Deliveries shows why. It is retried for a day.",
        )
    if dead := Delivery.objects.dead_since(timezone.now() - DEAD_FOR).count():
        yield (
            WARN,
            f"Dead deliveries of the last {DEAD_FOR.days} days: {dead}.",
            "Fix the receiver, then redeliver them: Deliveries, status dead.",
        )


def _secrets() -> Findings:
    found = secrets_at_rest.count()
    if settings.DEVELOPMENT_SECRET in settings.SECRETS_KEY:
        yield (
            WARN,
            "SECRETS_KEY has its default value, which is public and protects nothing.",
            "Set SECRETS_KEY: openssl rand -hex 32. Then: python manage.py rotate_secrets",
        )
    if found.unreadable:
        yield (
            BROKEN,
            f"{found.unreadable} of {found.total} stored secrets cannot be decrypted with SECRETS_KEY.",
            "Add the key that they were encrypted with after the present one.",
        )
    elif found.outdated:
        yield (
            WARN,
            f"{found.outdated} of {found.total} stored secrets are not encrypted with the newest key.",
            "Run: python manage.py rotate_secrets",
        )
    else:
        own = "" if settings.SECRETS_KEY != [settings.SECRET_KEY] else ", that of SECRET_KEY"
        yield OK, f"{found.total} encrypted with the newest key{own}.", ""


def _clock(host: str, time: datetime | None) -> Findings:
    if time is None:
        return
    skew = abs((datetime.now(UTC) - time).total_seconds())
    if skew <= CLOCK_WARN_SECONDS:
        return
    yield (
        WARN if skew <= CLOCK_BROKEN_SECONDS else BROKEN,
        f"The clocks of this host and of {host} are {skew:.0f} s apart.",
        "Synchronise both with NTP: tokens and events may count as expired or not yet valid.",
    )


def _date(response: httpx2.Response) -> datetime | None:
    try:
        date = parsedate_to_datetime(response.headers["Date"])
    except (KeyError, ValueError):
        return None
    return date if date.tzinfo else date.replace(tzinfo=UTC)


def _bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def _shown(url: str) -> str:
    """Return the URL without a password in it."""
    return str(settings.SCRUBBER(url))


CHECKS: dict[str, Callable[[], Findings]] = {
    "settings": _settings,
    "database": _database,
    "migrations": migrations,
    "redis": _redis,
    "broker": _broker,
    "workers": _workers,
    "homeserver": _homeserver,
    "model": _model,
    "connections": _connections,
    "ports": _ports,
    "static files": _static,
    "metrics": _metrics,
    "webhooks": _webhooks,
    "secrets": _secrets,
}
