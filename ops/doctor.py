"""What a new operator gets wrong, looked at from where this process stands.

Each check looks for itself and is given ten seconds; none changes anything that stays.
"""

import os
import socket
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
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
from lib import files
from lib.redis import why
from lib.secrets import Unreadable
from lib.timeouts import BoundedCheck, CheckFailed, run_checks
from ops import health, secrets_at_rest
from webhooks.models import Delivery, Subscription

OK, WARN, BROKEN = "ok", "warn", "broken"
PATIENCE_SECONDS = 10.0
HTTP_SECONDS = 4.0
CLIENT = "/_matrix/client/v3"
CLOCK_WARN_SECONDS, CLOCK_BROKEN_SECONDS = 5.0, 60.0
LEAST_REDIS = (6, 2)  # XAUTOCLAIM, XTRIM MINID
LEAST_POSTGRESQL = 14
DEAD_FOR = timedelta(days=7)
# The system check that the model's own check below says better.
SAID_ELSEWHERE = {"botrealm.W001"}


@dataclass(frozen=True)
class Finding:
    check: str
    level: str
    said: str
    mend: str = ""

    def as_json(self) -> dict[str, str]:
        return asdict(self)


Findings = Iterator[tuple[str, str, str]]  # level, what is found, how to mend it


def examine() -> list[Finding]:
    """All findings, in the order of the checks."""
    questions = {name: BoundedCheck(_listed(check)) for name, check in CHECKS.items()}
    return [
        Finding(name, *each)
        for name, answer in run_checks(questions, PATIENCE_SECONDS).items()
        for each in (
            [
                (
                    BROKEN,
                    f"It could not be looked at: {answer}",
                    "See the other findings, and the log.",
                )
            ]
            if isinstance(answer, CheckFailed)
            else answer
        )
    ]


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
            f"DEBUG is on, and ALLOWED_HOSTS lets others in: {', '.join(sorted(open_to))}.",
            "Set DEBUG=false, SECRET_KEY and REALM_SECRET_SEED.",
        )
    elif settings.DEBUG:
        yield OK, "DEBUG is on: for this machine only.", ""
    else:
        yield OK, f"DEBUG is off; answers to {', '.join(settings.ALLOWED_HOSTS) or 'nobody'}.", ""
    if built_in and not settings.DEBUG:
        yield BROKEN, f"{' and '.join(built_in)}: the built-in value.", "Set 50 random characters."
    if not settings.DEBUG and settings.BOT_RUNNER_PASSWORD == "password":  # noqa: S105
        yield (
            WARN,
            "BOT_RUNNER_PASSWORD is the built-in one.",
            "Give the bot's account a password of its own, and set it here.",
        )
    for message in checks.run_checks(tags=["botrealm"]):
        if message.id not in SAID_ELSEWHERE:
            level = BROKEN if message.level >= checks.ERROR else WARN
            yield level, message.msg, message.hint or ""
    if not settings.DEBUG and (
        found := checks.run_checks(tags=["security"], include_deployment_checks=True)
    ):
        yield (
            WARN,
            f"{len(found)} more about security.",
            "They are listed by: python manage.py check --deploy",
        )


def _database() -> Findings:
    with connection.cursor() as cursor:
        if connection.vendor == "sqlite":
            yield from _sqlite(cursor)
        else:
            yield from _postgresql(cursor)
    yield from _database_writes()


def _database_writes() -> Findings:
    """By a row that is never committed."""
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
            f"The database takes nothing that is written ({type(error).__name__}).",
            "Look for a full disk, a file that is read-only, a standby, or missing rights.",
        )


def _sqlite(cursor: Any) -> Findings:
    cursor.execute("SELECT sqlite_version()")
    version = cursor.fetchone()[0]
    cursor.execute("PRAGMA journal_mode")
    mode = cursor.fetchone()[0]
    if mode != "wal":
        yield (
            BROKEN,
            f"SQLite {version} in mode {mode!r}: whoever reads holds up whoever writes.",
            "Put the file on a local disk: network file systems cannot do WAL.",
        )
    elif settings.DEBUG:
        yield OK, f"SQLite {version}, WAL.", ""
    else:
        yield (
            WARN,
            f"SQLite {version}, WAL: for one host.",
            "More than one, or many users, want PostgreSQL: DATABASE_URL=postgres://...",
        )


def _postgresql(cursor: Any) -> Findings:
    cursor.execute("SELECT current_setting('server_version'), pg_is_in_recovery()")
    version, is_standby = cursor.fetchone()
    if int(version.split(".")[0]) < LEAST_POSTGRESQL:
        yield BROKEN, f"PostgreSQL {version}.", f"Version {LEAST_POSTGRESQL} or later is needed."
    elif is_standby:
        yield BROKEN, "This PostgreSQL is a standby.", "Let DATABASE_URL name the primary."
    else:
        yield OK, f"PostgreSQL {version}.", ""
    cursor.execute("SELECT clock_timestamp()")
    yield from _clock("the database", cursor.fetchone()[0])


def migrations() -> Findings:
    if missing := health.unapplied():
        shown = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        yield BROKEN, f"{len(missing)} not applied: {shown}.", "python manage.py migrate"
    else:
        yield OK, "All are applied.", ""


REDIS_AWAY = "Start it, or set REDIS_URL. Questions are kept meanwhile, and answered later."


def _redis() -> Findings:
    """The connection of the event stream, and whether Redis takes what is written."""
    try:
        found = list(redis_server(stream.probe_client().info()))
        yield from found
        if BROKEN not in {level for level, _, _ in found}:
            stream.check_writable()
    except RedisError as error:
        yield BROKEN, why(error), REDIS_AWAY


def _broker() -> Findings:
    """Celery's own connection, made as a worker makes it: its channel writes before it is used."""
    patience = {"socket_timeout": 3, "socket_connect_timeout": 3}
    try:
        with current_app.connection_for_read(transport_options=patience) as broker:
            broker.connect()
    except RedisError as error:
        yield BROKEN, why(error), "Workers are given nothing meanwhile. " + REDIS_AWAY
    else:
        yield OK, f"Celery reaches its queue at {broker.as_uri()}.", ""


def redis_server(info: Mapping[str, Any]) -> Findings:
    """What a Redis says of itself (INFO), judged."""
    version = str(info["redis_version"])
    keeps = "keeps what it holds" if info.get("aof_enabled") else "may forget, which does no harm"
    if tuple(map(int, version.split(".")[:2])) < LEAST_REDIS:
        yield BROKEN, f"Redis {version}.", "Version 6.2 or later is needed."
    elif info.get("role") == "slave":
        yield BROKEN, "This Redis is a replica.", "Let REDIS_URL name the primary."
    elif info.get("redis_mode") == "cluster":
        yield BROKEN, "This Redis is a cluster.", "Celery's queues need a single one."
    else:
        yield OK, f"Redis {version}; {keeps}.", ""
    policy = str(info.get("maxmemory_policy", "noeviction"))
    if policy != "noeviction":
        yield (
            BROKEN if policy.startswith("allkeys") else WARN,
            f"maxmemory-policy is {policy}: a full Redis throws away the stream and the queue.",
            "Set maxmemory-policy noeviction, and keep caches of others elsewhere.",
        )


def _workers() -> Findings:
    alive = list(Worker.objects.alive())
    reading = Worker.objects.reading().count()
    waiting = Run.objects.unfinished().count()
    if not reading:
        yield (
            WARN,
            f"None reads the stream; {waiting} runs wait.",
            "celery -A config worker",
        )
        return
    yield OK, f"{reading} at work, {sum(each.runs_in_hand for each in alive)} runs in hand.", ""
    if len(versions := {each.version for each in alive}) > 1:
        yield (
            WARN,
            f"They run different versions: {', '.join(sorted(versions))}.",
            "Start the old ones again.",
        )


def _homeserver() -> Findings:
    session = Session.objects.filter(
        homeserver=settings.MATRIX_URL, username=settings.BOT_RUNNER_USERNAME
    ).first()
    is_wanted = bool(session or os.environ.get("MATRIX_URL", "").strip())
    with httpx2.Client(base_url=settings.MATRIX_URL, timeout=HTTP_SECONDS) as client:
        try:
            versions = client.get("/_matrix/client/versions")
            versions.raise_for_status()
            spoken = str(versions.json()["versions"][-1])
        except (httpx2.HTTPError, ValueError, LookupError, TypeError) as error:
            yield (
                BROKEN if is_wanted else WARN,
                f"No homeserver answers at {_shown(settings.MATRIX_URL)} ({type(error).__name__}).",
                "Set MATRIX_URL. Without rooms there is no need of it: run no bot runner.",
            )
            return
        yield OK, f"{_shown(settings.MATRIX_URL)} speaks {spoken}.", ""
        yield from _clock("the homeserver", _date(versions))
        try:
            yield from _login(client, session)
        except httpx2.HTTPError as error:
            yield WARN, f"The login was not answered ({type(error).__name__}).", "Look again later."


def _login(client: httpx2.Client, session: Session | None) -> Findings:
    """By the stored token; where there is none by the password, and out again, so that no device is
    left."""
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
                f"The stored login of {session} is no longer good ({response.status_code}).",
                "The bot runner logs in again by itself, with BOT_RUNNER_PASSWORD.",
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
        yield WARN, "Too many logins of late: it could not be tried.", _RATE_LIMITS
    elif response.status_code != 200:
        yield (
            BROKEN,
            f"It refuses {settings.BOT_RUNNER_USERNAME} ({response.status_code}).",
            "Make the account, or set BOT_RUNNER_USERNAME and BOT_RUNNER_PASSWORD.",
        )
    else:
        token = response.json()["access_token"]
        out = client.post(f"{CLIENT}/logout", json={}, headers=_bearer(token))
        if out.status_code == 200:
            yield OK, "BOT_RUNNER_USERNAME and BOT_RUNNER_PASSWORD are good.", _RATE_LIMITS
        else:
            yield WARN, "The login worked, the logout did not.", "Remove the device of the account."


_RATE_LIMITS = (
    "If replies come slowly, lift the bot's rate limit. Synapse: POST "
    "/_synapse/admin/v1/users/<bot>/override_ratelimit"
)


def _model() -> Findings:
    if not completions.configured():
        yield (
            WARN,
            "None: every answer is an echo of its question.",
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
            "Look at OPENAI_BASE_URL, and at the way out of this network.",
        )
        return
    if response.status_code in (401, 403):
        yield BROKEN, f"{_shown(base)} refuses the key.", "Set a good OPENAI_API_KEY."
    elif response.status_code != 200:
        yield (
            WARN,
            f"{_shown(base)} does not list its models ({response.status_code}).",
            "If answers come all the same, never mind. Else look at OPENAI_BASE_URL: many end in /v1.",
        )
    else:
        yield from _listed_models(base, response)
    yield from _clock("the model's endpoint", _date(response))


def _listed_models(base: str, response: httpx2.Response) -> Findings:
    try:
        known = {str(model["id"]) for model in response.json()["data"]}
    except (ValueError, LookupError, TypeError):
        known = set()
    wanted = {settings.CHAT_DEFAULT_MODEL, *settings.CHAT_ALLOWED_MODELS}
    wanted |= {settings.CHAT_SUMMARY_MODEL} - {""}
    if known and (missing := sorted(wanted - known)):
        yield (
            WARN,
            f"{_shown(base)} does not know {', '.join(missing)}.",
            "Look at CHAT_DEFAULT_MODEL, CHAT_ALLOWED_MODELS and CHAT_SUMMARY_MODEL. "
            f"It knows: {', '.join(sorted(known)[:8])}{', ...' if len(known) > 8 else ''}",
        )
    else:
        yield OK, f"{_shown(base)} answers; default model {settings.CHAT_DEFAULT_MODEL}.", ""


def _connections() -> Findings:
    possible, wanted = files.connections(), settings.CHAT_MAX_STREAMS
    most = min(possible, settings.WEB_MAX_CONNECTIONS or possible)
    if most > wanted:
        yield OK, f"A web process has room for {most}, of which {wanted} may be streams.", ""
        return
    yield (
        WARN,
        f"CHAT_MAX_STREAMS is {wanted}, and a web process has room for {most} connections: streams "
        "alone can keep all others out.",
        f"The limit of open files is {files.limit()}: raise LimitNOFILE, ulimits or ulimit -n (and "
        "WEB_MAX_CONNECTIONS, where it is set), or lower CHAT_MAX_STREAMS.",
    )


def _ports() -> Findings:
    for name, default in (("PORT", 3000), ("REALM_SERVER_PORT", 4201)):
        port = int(os.environ.get(name, "").strip() or default)
        with socket.socket() as probe:
            probe.settimeout(1)
            is_taken = probe.connect_ex(("127.0.0.1", port)) == 0
        if not is_taken:
            yield OK, f"{port} is free.", ""
        elif _is_ours(port):
            yield OK, f"{port} is answered by this server.", ""
        else:
            yield WARN, f"{port} is taken by another program.", f"{name}=<a free one> make run"


def _is_ours(port: int) -> bool:
    try:
        told = httpx2.get(f"http://127.0.0.1:{port}/healthz", timeout=HTTP_SECONDS, trust_env=False)
        return bool(told.json().get("service") == "botrealm")
    except (httpx2.HTTPError, ValueError, AttributeError):
        return False


def _static() -> Findings:
    found = finders.find("admin/css/base.css") if settings.WHITENOISE_USE_FINDERS else None
    root = getattr(settings, "STATIC_ROOT", None)
    if found or (root and os.path.exists(os.path.join(root, "admin/css/base.css"))):
        yield OK, "The admin's are found.", ""
    else:
        yield BROKEN, "The admin has no styles.", "python manage.py collectstatic"


def _metrics() -> Findings:
    folder = settings.PROMETHEUS_MULTIPROC_DIR
    if not folder:
        yield (
            OK if settings.DEBUG else WARN,
            "/metrics counts the requests of one web process only.",
            "With several, set PROMETHEUS_MULTIPROC_DIR to an empty directory of each host.",
        )
        return
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        yield BROKEN, f"Nothing can be written to {folder}: {error.strerror}.", "Make it writable."
    else:
        yield OK, "The web processes add up what they count.", ""


def _webhooks() -> Findings:
    enabled = list(Subscription.objects.enabled())
    yield OK, f"{len(enabled)} are told of outcomes.", ""
    if unheard := sorted({each.host for each in enabled if not each.is_allowed}):
        yield (
            WARN,
            f"HOOKS_ALLOWED_HOSTS does not name {', '.join(unheard)} (any more).",
            "Name the host there, or disable the webhook.",
        )
    if failing := sorted({each.host for each in enabled if each.failing_since}):
        yield (
            WARN,
            f"The last delivery to {', '.join(failing)} failed.",
            "The admin's page Deliveries tells why. It is tried again for a day.",
        )
    if dead := Delivery.objects.dead_since(timezone.now() - DEAD_FOR).count():
        yield (
            WARN,
            f"{dead} deliveries of the last {DEAD_FOR.days} days were given up.",
            "Mend the receiver, then send them again: Deliveries, status dead.",
        )


def _secrets() -> Findings:
    found = secrets_at_rest.count()
    if settings.DEVELOPMENT_SECRET in settings.SECRETS_KEY:
        yield (
            WARN,
            "SECRETS_KEY is the built-in key, which protects nothing: everybody knows it.",
            "Set SECRETS_KEY: openssl rand -hex 32. Then: python manage.py rotate_secrets",
        )
    if found.unreadable:
        yield (
            BROKEN,
            f"{found.unreadable} of {found.total} stored secrets cannot be read by SECRETS_KEY.",
            "Put the key that they were encrypted under beside the present one.",
        )
    elif found.outdated:
        yield (
            WARN,
            f"{found.outdated} of {found.total} stored secrets are not encrypted under the newest key.",
            "python manage.py rotate_secrets",
        )
    else:
        own = "" if settings.SECRETS_KEY != [settings.SECRET_KEY] else ", that of SECRET_KEY"
        yield OK, f"{found.total} are encrypted under the newest key{own}.", ""


def _clock(whose: str, time: datetime | None) -> Findings:
    if time is None:
        return
    off = abs((datetime.now(UTC) - time).total_seconds())
    if off <= CLOCK_WARN_SECONDS:
        return
    yield (
        WARN if off <= CLOCK_BROKEN_SECONDS else BROKEN,
        f"The clocks of this host and of {whose} are {off:.0f} s apart.",
        "Let both keep time with NTP: tokens and events would be taken for old or not yet good.",
    )


def _date(response: httpx2.Response) -> datetime | None:
    try:
        found = parsedate_to_datetime(response.headers["Date"])
    except (KeyError, ValueError):
        return None
    return found if found.tzinfo else found.replace(tzinfo=UTC)


def _bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def _shown(url: str) -> str:
    """Without the password that may stand in it."""
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
