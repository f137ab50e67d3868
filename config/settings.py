"""Django's settings, from environment variables; docs/reference/settings.md has the table.

A file `.env` is read if it exists.
"""

import os
import sys
import tomllib
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

from django.core.exceptions import ImproperlyConfigured

from config import env, errors, logs
from config.scrub import Scrubber
from console import navigation

BASE_DIR = Path(__file__).resolve().parent.parent
VERSION = tomllib.loads((BASE_DIR / "pyproject.toml").read_text())["project"]["version"]
env.load(BASE_DIR / ".env")

# On by default, so that a fresh clone works without configuration: the local stack listens on loopback
# only. With DEBUG off the built-in secrets are refused.
DEBUG = env.flag("DEBUG", True)
DEVELOPMENT_SECRET = "for-development-only-0123456789-0123456789-0123456789"  # noqa: S105
SECRET_KEY = env.signing_secret("SECRET_KEY", DEVELOPMENT_SECRET)
REALM_SECRET_SEED = env.signing_secret("REALM_SECRET_SEED", DEVELOPMENT_SECRET)
# Secrets that this process does not have: the web server and `realm_token` then refuse to start.
UNUSED_SECRETS = env.unused_secrets("SECRET_KEY", "REALM_SECRET_SEED")
for _name, _secret in (("SECRET_KEY", SECRET_KEY), ("REALM_SECRET_SEED", REALM_SECRET_SEED)):
    # Not in a system check: web servers and workers do not run those.
    if not DEBUG and (_secret == DEVELOPMENT_SECRET or len(_secret) < 32):
        raise ImproperlyConfigured(
            f"{_name} is the built-in value or has fewer than 32 characters, although DEBUG is off: "
            "set it to 50 or more random characters."
        )
# The keys that encrypt secrets at rest (lib/secrets.py), the newest first; SECRET_KEY by default.
if "SECRET_KEY" in UNUSED_SECRETS and not env.words("SECRETS_KEY"):
    raise ImproperlyConfigured("SECRETS_KEY is required if SECRET_KEY is unused.")
SECRETS_KEY = env.words("SECRETS_KEY") or [SECRET_KEY]
if not DEBUG and any(key == DEVELOPMENT_SECRET or len(key) < 32 for key in SECRETS_KEY):
    raise ImproperlyConfigured(
        "SECRETS_KEY is the built-in value or has fewer than 32 characters, although DEBUG is off: set "
        "it to 50 or more random characters, for example with: openssl rand -hex 32"
    )
# The platform's health check runs beside the server; see HEALTHCHECK in the Dockerfile.
ALLOWED_HOSTS = [*env.words("ALLOWED_HOSTS", "localhost,127.0.0.1,[::1]"), "127.0.0.1"]
CSRF_TRUSTED_ORIGINS = env.words("CSRF_TRUSTED_ORIGINS")
# The path below which a proxy serves this system; None: it has a host of its own. The proxy may remove
# the path from requests, or leave it (config.server.bridge).
FORCE_SCRIPT_NAME = env.path_prefix("FORCE_SCRIPT_NAME")
SESSION_COOKIE_PATH = CSRF_COOKIE_PATH = LANGUAGE_COOKIE_PATH = FORCE_SCRIPT_NAME or "/"

INSTALLED_APPS = [
    # Before the console, which unregisters the admin page with the keys of devices.
    "axes",
    "django_otp",
    "django_otp.plugins.otp_totp",
    "realm",
    "chat",
    "agents",
    "botrunner",
    "webhooks",
    "console",
    "ops",
    "config.apps.ConfigConfig",
    "rest_framework",
    "rest_framework_json_api",
    "drf_spectacular_sidecar",
    # Before the admin, whose templates it overrides.
    "unfold",
    "unfold.contrib.filters",
    "unfold.contrib.forms",
    # Without autodiscovery: only processes that serve pages load the admin (config.urls).
    "django.contrib.admin.apps.SimpleAdminConfig",
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.sessions",
    "django.contrib.messages",
    "django.contrib.staticfiles",
]
MIDDLEWARE = [
    # Before any middleware that may answer.
    "config.middleware.CachePolicyMiddleware",
    "ops.middleware.RequestMiddleware",
    "lib.plainjson.APIPathsMiddleware",
    "lib.jsonapi.errors.JSONAPIErrorsMiddleware",
    "django.middleware.security.SecurityMiddleware",
    "config.middleware.PermissionsPolicyMiddleware",
    "config.middleware.ContentSecurityPolicyMiddleware",
    "whitenoise.middleware.WhiteNoiseMiddleware",
    "console.middleware.AdminMethodsMiddleware",
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.common.CommonMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django_otp.middleware.OTPMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
    "django.middleware.clickjacking.XFrameOptionsMiddleware",
    "console.middleware.SecondFactorMiddleware",
    "console.middleware.LoginThrottleMiddleware",
    "axes.middleware.AxesMiddleware",
]
ROOT_URLCONF = "config.urls"
# Paths where errors are JSON:API documents: the realm server, and resources of the chat server.
JSONAPI_PATHS = r"/(_|api/(threads|messages|runs)(/|\Z))"
WSGI_APPLICATION = "config.wsgi.application"
TEMPLATES = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "DIRS": [BASE_DIR / "templates"],
        "APP_DIRS": True,
        "OPTIONS": {
            "context_processors": [
                "django.template.context_processors.request",
                "django.contrib.auth.context_processors.auth",
                "django.contrib.messages.context_processors.messages",
            ]
        },
    }
]

AUTHENTICATION_BACKENDS = [
    "axes.backends.AxesStandaloneBackend",
    "django.contrib.auth.backends.ModelBackend",
]
# Wrong passwords for a name from an address lock it for a while. They are counted in the database,
# because Redis may lose everything.
AXES_FAILURE_LIMIT = env.integer("AXES_FAILURE_LIMIT", 5, minimum=1)
AXES_COOLOFF_TIME = timedelta(minutes=env.integer("AXES_COOLOFF_MINUTES", 15, minimum=1))
AXES_LOCKOUT_PARAMETERS = [["username", "ip_address"]]
AXES_HANDLER = "axes.handlers.database.AxesDatabaseHandler"
AXES_RESET_ON_SUCCESS = True
# Further attempts do not lock out the owner for longer.
AXES_RESET_COOL_OFF_ON_FAILURE_DURING_LOCKOUT = False
AXES_CLIENT_IP_CALLABLE = "lib.clients.client_ip"
AXES_LOCKOUT_CALLABLE = "console.login.locked_out"
# The audit trail of the console records it.
AXES_DISABLE_ACCESS_LOG = True
AXES_ENABLE_ADMIN = False
AXES_VERBOSE = False
ADMIN_REQUIRE_TOTP = env.flag("ADMIN_REQUIRE_TOTP", False)
OTP_TOTP_ISSUER = "Botrealm"
TRUSTED_PROXIES = env.integer("TRUSTED_PROXIES", 0, maximum=10)
AUTH_USER_MODEL = "realm.User"
AUTH_PASSWORD_VALIDATORS = [
    {"NAME": f"django.contrib.auth.password_validation.{name}"}
    for name in (
        "UserAttributeSimilarityValidator",
        "MinimumLengthValidator",
        "CommonPasswordValidator",
        "NumericPasswordValidator",
    )
]
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
LANGUAGE_CODE = "en-us"
USE_I18N = False
TIME_ZONE = "UTC"
USE_TZ = True
FORMAT_MODULE_PATH = "config.formats"
STATIC_URL = f"{FORCE_SCRIPT_NAME or ''}/static/"
STATIC_ROOT = BASE_DIR / env.text("STATIC_ROOT", "staticfiles")
STORAGES = {
    "default": {"BACKEND": "django.core.files.storage.FileSystemStorage"},
    "staticfiles": {"BACKEND": "config.static.HashedFilesStorage"},
}
WHITENOISE_USE_FINDERS = True
# STATIC_ROOT does not exist before the first `collectstatic`.
warnings.filterwarnings("ignore", "No directory at")

UNFOLD = navigation.UNFOLD

# Database
DATABASES: dict[str, dict[str, Any]] = {
    "default": env.database("DATABASE_URL", "file:./db/sqlite.db", base=BASE_DIR)
}
_database = DATABASES["default"]
# How a PgBouncer between this process and PostgreSQL shares connections; empty: there is none.
DATABASE_PGBOUNCER = env.choice("DATABASE_PGBOUNCER", "", ("", "session", "transaction"))
if "sqlite" in _database["ENGINE"]:
    if _database["NAME"] != ":memory:":
        # It has messages, sessions and the bot's access token.
        env.make_folder("DATABASE_URL", Path(_database["NAME"]).parent, mode=0o700)
    _database["CONN_MAX_AGE"] = None
    _database["OPTIONS"] = {
        # Without IMMEDIATE a transaction that reads before it writes fails at once under load, despite
        # the time-out: SQLite cannot let it wait without losing its snapshot.
        "transaction_mode": "IMMEDIATE",
        "timeout": 20,
        "init_command": "PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL;",
    }
else:
    # A thread holds a connection for one unit of work, never during a model call: a small pool serves
    # many threads.
    _database["CONN_HEALTH_CHECKS"] = True
    _options = _database.get("OPTIONS", {})
    # A process that freezes in a transaction holds its locks, for which all others wait: the server
    # rolls back such a transaction. PgBouncer refuses the parameter.
    _guard = {} if DATABASE_PGBOUNCER else {"options": "-c idle_in_transaction_session_timeout=10s"}
    # A cursor of the server outlives its transaction, and PgBouncer's next one has another connection.
    _database["DISABLE_SERVER_SIDE_CURSORS"] = DATABASE_PGBOUNCER == "transaction"
    _database["OPTIONS"] = {
        # A host that vanishes is detected in seconds, not after the kernel's 15 minutes.
        "connect_timeout": 5,
        "tcp_user_timeout": 10_000,
        "keepalives_idle": 10,
        "keepalives_interval": 3,
        **_guard,
        **_options,
        "pool": {
            "min_size": 1,
            "max_size": env.integer("DATABASE_POOL_SIZE", 16, minimum=1),
            # In each such period, one connection that was not needed in it is closed.
            "max_idle": 5,
            # The pool backs off between attempts; the next request starts over.
            "timeout": 5,
            "reconnect_timeout": 5,
        },
    }

# Redis: the event stream, Celery's broker and the cache. It may lose everything at any moment.
REDIS_URL = env.text("REDIS_URL", "redis://localhost:6379")
REDIS_CA_FILE = env.file("REDIS_CA_FILE")
REDIS_CLIENT_CERT_FILE = env.file("REDIS_CLIENT_CERT_FILE")
REDIS_CLIENT_KEY_FILE = env.file("REDIS_CLIENT_KEY_FILE")
_redis = env.redis_server(
    REDIS_URL,
    ca_file=REDIS_CA_FILE,
    cert_file=REDIS_CLIENT_CERT_FILE,
    key_file=REDIS_CLIENT_KEY_FILE,
)
REDIS_STREAM_KEY = env.text("REDIS_STREAM_KEY", "agent_events")
REDIS_CONSUMER_GROUP = env.text("REDIS_CONSUMER_GROUP", "agent_runtime")
REDIS_CONSUMER_NAME = env.text("REDIS_CONSUMER_NAME")  # empty: worker-<pid>, set in the worker
REDIS_STREAM_RETENTION_HOURS = env.integer("REDIS_STREAM_RETENTION_HOURS", 24, minimum=1)
REDIS_STREAM_MAX_BYTES = env.integer("REDIS_STREAM_MAX_BYTES", 256 * 1024 * 1024)  # 0: no limit
REDIS_STREAM_DEAD_LENGTH = env.integer("REDIS_STREAM_DEAD_LENGTH", 10_000)
CACHES = {
    "default": {
        "BACKEND": "django_redis.cache.RedisCache",
        "LOCATION": str(_redis),  # for display; the connections are those of lib.redis
        "KEY_PREFIX": "botrealm",
        "OPTIONS": {
            "CONNECTION_FACTORY": "lib.redis.CacheConnections",
            "SOCKET_CONNECT_TIMEOUT": 0.3,
            "SOCKET_TIMEOUT": 0.3,
            "IGNORE_EXCEPTIONS": True,
        },
    }
}

# Realm
MATRIX_URL = env.url("MATRIX_URL", "http://localhost:8008", schemes=("http", "https")).rstrip("/")
# Attempts of a network to get a server session; 0: no limit (realm/throttles.py).
SERVER_SESSIONS_PER_MINUTE = env.integer("SERVER_SESSIONS_PER_MINUTE", 120)
# Attempts of a network to sign in with a password, for any names; 0: no limit (console/middleware.py).
LOGIN_TRIES_PER_MINUTE = env.integer("LOGIN_TRIES_PER_MINUTE", 30)

# Chat
CHAT_ALLOW_ANONYMOUS = env.flag("CHAT_ALLOW_ANONYMOUS", DEBUG)
CHAT_ALLOWED_MODELS = env.words("CHAT_ALLOWED_MODELS")
CHAT_DEFAULT_MODEL = env.text("CHAT_DEFAULT_MODEL", "gpt-4o-mini")
if CHAT_ALLOWED_MODELS and CHAT_DEFAULT_MODEL not in CHAT_ALLOWED_MODELS:
    CHAT_DEFAULT_MODEL = CHAT_ALLOWED_MODELS[0]
CHAT_SUMMARY_MODEL = env.text("CHAT_SUMMARY_MODEL")  # empty: the model of the run
for _name, _model in [
    ("CHAT_DEFAULT_MODEL", CHAT_DEFAULT_MODEL),
    ("CHAT_SUMMARY_MODEL", CHAT_SUMMARY_MODEL),
    *(("CHAT_ALLOWED_MODELS", model) for model in CHAT_ALLOWED_MODELS),
]:
    if len(_model) > 100:
        raise ImproperlyConfigured(f"{_name}: a model's name has at most 100 characters.")
CHAT_MEMORY_RECENT_MESSAGES = env.integer("CHAT_MEMORY_RECENT_MESSAGES", 8, minimum=1, maximum=1000)
# Of a message, and of all earlier messages in a prompt (agents.runs.memory); 0: no limit.
CHAT_MAX_MESSAGE_CHARACTERS = env.integer("CHAT_MAX_MESSAGE_CHARACTERS", 400_000)
CHAT_MAX_WAIT_SECONDS = env.integer("CHAT_MAX_WAIT_SECONDS", 60)
CHAT_MAX_STREAMS = env.integer("CHAT_MAX_STREAMS", 5000, minimum=1)  # of a web process
CHAT_MAX_WAITS = env.integer("CHAT_MAX_WAITS", 2000)  # requests of a web process with Prefer: wait
CHAT_MAX_STREAMS_PER_USER = env.integer("CHAT_MAX_STREAMS_PER_USER", 50)  # of these; 0: no limit
CHAT_WHEN_BUSY = env.choice(
    "CHAT_WHEN_BUSY", "enqueue", ("enqueue", "merge", "reject", "interrupt")
)
CHAT_RUN_DEADLINE_SECONDS = env.integer("CHAT_RUN_DEADLINE_SECONDS", 0, maximum=86400)  # 0: none
DATA_UPLOAD_MAX_MEMORY_SIZE = env.integer("MAX_BODY_BYTES", 1024 * 1024, minimum=1024)

# Limits of a connection and of a web process (config/server).
WEB_MAX_CONNECTIONS = env.integer("WEB_MAX_CONNECTIONS", 0)  # 0: as the limit of files permits
WEB_MAX_CONNECTIONS_PER_ADDRESS = env.integer(
    "WEB_MAX_CONNECTIONS_PER_ADDRESS", 1000
)  # 0: no limit
WEB_MAX_WAITING = env.integer("WEB_MAX_WAITING", 1000, minimum=1)
WEB_MAX_HELD_BYTES = env.integer("WEB_MAX_HELD_BYTES", 128 * 1024 * 1024, minimum=1024 * 1024)
WEB_HEAD_SECONDS = env.seconds("WEB_HEAD_SECONDS", 10)
WEB_BODY_SECONDS = env.seconds("WEB_BODY_SECONDS", 60)
WEB_SEND_SECONDS = env.seconds("WEB_SEND_SECONDS", 30)

# Model and runs
OPENAI_API_KEY = env.text("OPENAI_API_KEY")
OPENAI_BASE_URL = env.url("OPENAI_BASE_URL", schemes=("http", "https"))
OPENAI_TIMEOUT_SECONDS = env.seconds("OPENAI_TIMEOUT_SECONDS", 60)
AGENT_MAX_LOOP_ITERATIONS = env.integer("AGENT_MAX_LOOP_ITERATIONS", 8, minimum=1, maximum=100)
AGENT_TOOLS = env.words("AGENT_TOOLS")
AGENT_MAX_ATTEMPTS = env.integer("AGENT_MAX_ATTEMPTS", 5, minimum=1, maximum=100)
AGENT_LEASE_SECONDS = env.seconds("AGENT_LEASE_SECONDS", 10, minimum=1)
# The percentage of all slots that the runs of one user may occupy.
AGENT_USER_SHARE = env.integer("AGENT_USER_SHARE", 80, minimum=1, maximum=100)
AGENT_DEADLINE_SECONDS = env.seconds("AGENT_DEADLINE_SECONDS", 600, minimum=1)
# Of one answer. The model receives the limit, and a limited budget reserves as much before the call.
AGENT_MAX_OUTPUT_TOKENS = env.integer("AGENT_MAX_OUTPUT_TOKENS", 0, maximum=1_000_000)
# The limit's name in the request: older servers know only `max_tokens`.
AGENT_MAX_OUTPUT_TOKENS_FIELD = env.choice(
    "AGENT_MAX_OUTPUT_TOKENS_FIELD",
    "max_completion_tokens",
    ("max_completion_tokens", "max_tokens"),
)

# Limits of a user and of a room (agents/usage/limits.py); 0: no limit. The admin can override them.
LIMIT_USER_MESSAGES_PER_MINUTE = env.integer(
    "LIMIT_USER_MESSAGES_PER_MINUTE", 60, maximum=1_000_000
)
LIMIT_USER_RUNS_UNFINISHED = env.integer("LIMIT_USER_RUNS_UNFINISHED", 100, maximum=1_000_000)
LIMIT_USER_TOKENS_PER_DAY = env.integer("LIMIT_USER_TOKENS_PER_DAY", 0, maximum=10**15)
LIMIT_USER_COST_PER_DAY = env.amount("LIMIT_USER_COST_PER_DAY")
LIMIT_USER_BYTES_PER_DAY = env.integer("LIMIT_USER_BYTES_PER_DAY", 50_000_000, maximum=10**15)
LIMIT_ROOM_MESSAGES_PER_MINUTE = env.integer(
    "LIMIT_ROOM_MESSAGES_PER_MINUTE", 120, maximum=1_000_000
)
LIMIT_ROOM_RUNS_UNFINISHED = env.integer("LIMIT_ROOM_RUNS_UNFINISHED", 200, maximum=1_000_000)
LIMIT_ROOM_TOKENS_PER_DAY = env.integer("LIMIT_ROOM_TOKENS_PER_DAY", 0, maximum=10**15)
LIMIT_ROOM_COST_PER_DAY = env.amount("LIMIT_ROOM_COST_PER_DAY")
LIMIT_ROOM_BYTES_PER_DAY = env.integer("LIMIT_ROOM_BYTES_PER_DAY", 100_000_000, maximum=10**15)

# The days that finished records are kept; 0: forever. See the retention.py of agents, console and
# webhooks.
RETENTION_STEPS_DAYS = env.integer("RETENTION_STEPS_DAYS", 90)
RETENTION_ATTEMPTS_DAYS = env.integer("RETENTION_ATTEMPTS_DAYS", 90)
RETENTION_EVENTS_DAYS = env.integer("RETENTION_EVENTS_DAYS", 30)
RETENTION_THREADS_DAYS = env.integer("RETENTION_THREADS_DAYS", 0)
RETENTION_AUDIT_DAYS = env.integer("RETENTION_AUDIT_DAYS", 365)
RETENTION_BULK_DAYS = env.integer("RETENTION_BULK_DAYS", 30)
RETENTION_DELIVERIES_DAYS = env.integer("RETENTION_DELIVERIES_DAYS", 30)

# The ports of calls to URLs that users configure.
OUTGOING_PORTS = env.ports("OUTGOING_PORTS", "443")

# Webhooks: the hosts that a bot command may call, such as hooks.example.org or *.example.com.
AGENT_WEBHOOK_HOSTS = env.words("AGENT_WEBHOOK_HOSTS")
AGENT_WEBHOOK_SECRET = env.text("AGENT_WEBHOOK_SECRET")
AGENT_WEBHOOK_TIMEOUT_SECONDS = env.seconds("AGENT_WEBHOOK_TIMEOUT_SECONDS", 30)
if AGENT_WEBHOOK_HOSTS and len(AGENT_WEBHOOK_SECRET) < 32:
    raise ImproperlyConfigured(
        "AGENT_WEBHOOK_SECRET needs 32 or more characters if AGENT_WEBHOOK_HOSTS is set."
    )

# The hosts of webhooks that users subscribe to run outcomes.
HOOKS_ALLOWED_HOSTS = env.words("HOOKS_ALLOWED_HOSTS")
HOOKS_TIMEOUT_SECONDS = env.seconds("HOOKS_TIMEOUT_SECONDS", 15)

# Bot runner
BOT_RUNNER_USERNAME = env.text("BOT_RUNNER_USERNAME", "bot-runner")
BOT_RUNNER_PASSWORD = env.text("BOT_RUNNER_PASSWORD", "password")
# The users who may invite the bot, and those it ignores: patterns such as @*:example.org
BOT_RUNNER_ALLOWED_INVITERS = env.words("BOT_RUNNER_ALLOWED_INVITERS", "*")
BOT_RUNNER_LEAVE_EMPTY_ROOMS = env.flag("BOT_RUNNER_LEAVE_EMPTY_ROOMS", True)
BOT_RUNNER_IGNORED_SENDERS = env.words("BOT_RUNNER_IGNORED_SENDERS")
# An event that is older when the bot receives it is not answered.
BOT_RUNNER_MAX_EVENT_AGE = env.seconds("BOT_RUNNER_MAX_EVENT_AGE", 24 * 3600, minimum=1)
# Days to keep room events that ran no command, and replies.
BOT_RUNNER_EVENT_RETENTION_DAYS = env.integer("BOT_RUNNER_EVENT_RETENTION_DAYS", 7, minimum=1)
BOT_RUNNER_REPLY_RETENTION_DAYS = env.integer("BOT_RUNNER_REPLY_RETENTION_DAYS", 90, minimum=1)
# A sender who reacts to this many answers in a row, each within the time, is taken for a bot in a loop
# and no longer answered in that room. 0: never.
BOT_RUNNER_LOOP_ANSWERS = env.integer("BOT_RUNNER_LOOP_ANSWERS", 15)
BOT_RUNNER_LOOP_SECONDS = env.seconds("BOT_RUNNER_LOOP_SECONDS", 2)
BOT_RUNNER_LEASE_SECONDS = env.seconds("BOT_RUNNER_LEASE_SECONDS", 6, minimum=1)
# The keys of encrypted rooms. Every host that runs a bot runner must see the same directory.
BOT_RUNNER_STORE = BASE_DIR / env.text("BOT_RUNNER_STORE", "db/botrunner")
BOT_RUNNER_CONSUMER_GROUP = env.text("BOT_RUNNER_CONSUMER_GROUP", "bot_runner")
# Show an answer in its room while it is written, by edits of a message.
BOT_STREAM_EDITS = env.flag("BOT_STREAM_EDITS", False)
# A longer answer is sent as a file. A part has about 19,000 characters of English.
BOT_RUNNER_MAX_PARTS = env.integer("BOT_RUNNER_MAX_PARTS", 4, minimum=1, maximum=50)
# An answer that took longer mentions the person who asked; 0 for always.
BOT_RUNNER_MENTION_AFTER = env.seconds_or_never("BOT_RUNNER_MENTION_AFTER", 30)

# Celery. The database is the queue of record, and a task only wakes a worker: nothing depends on
# Celery's redelivery, which takes minutes, or on its countdown and eta.
# Without the password, which `celery inspect` would show. The connections are those of lib.redis
# (config/server/broker.py).
CELERY_BROKER_URL = str(_redis)
CELERY_BROKER_TRANSPORT = "config.server.broker:Transport"
CELERY_BROKER_CONNECTION_RETRY_ON_STARTUP = True
CELERY_BROKER_CONNECTION_MAX_RETRIES = None
# A Redis that is full, a replica or unable to save refuses commands over a working connection. Celery
# would end the worker then.
CELERY_BROKER_CHANNEL_ERROR_RETRY = True
CELERY_BROKER_TRANSPORT_OPTIONS = {
    "visibility_timeout": 3600,
    "unacked_restore_interval": 5,
    "unacked_restore_throttle": 1,
    "socket_timeout": 10,
    "socket_connect_timeout": 2,
    "socket_keepalive": True,
    "health_check_interval": 25,
}
# The stream's name separates deployments that share a Redis. (kombu's global_keyprefix would do so for
# all its keys, at a tenth of a worker's time.)
CELERY_TASK_DEFAULT_QUEUE = f"{REDIS_STREAM_KEY}:celery"
CELERY_TIMEZONE = TIME_ZONE
CELERY_TASK_IGNORE_RESULT = True
CELERY_TASK_ACKS_LATE = True
CELERY_TASK_SERIALIZER = "json"
CELERY_ACCEPT_CONTENT = ["json"]
# A run mostly waits for its model, which is cheaper in a thread than in a process. Celery's time limits
# do not apply to threads; a run has its own deadline (agents/llm/completions.py).
CELERY_WORKER_POOL = "threads"
CELERY_WORKER_CONCURRENCY = env.integer("WORKER_CONCURRENCY", 100, minimum=1, maximum=1000)
CELERY_WORKER_PREFETCH_MULTIPLIER = 1
# The time that a stopping worker gives its runs before it releases them (agents/worker/bootstep.py).
# A supervisor must wait a few seconds longer before it kills the worker.
WORKER_GRACE_SECONDS = env.seconds("WORKER_GRACE_SECONDS", 25, minimum=0)
CELERY_WORKER_SOFT_SHUTDOWN_TIMEOUT = WORKER_GRACE_SECONDS
CELERY_WORKER_CANCEL_LONG_RUNNING_TASKS_ON_CONNECTION_LOSS = False
CELERY_WORKER_SEND_TASK_EVENTS = False
CELERY_WORKER_ENABLE_REMOTE_CONTROL = True

REST_FRAMEWORK = {
    "DEFAULT_AUTHENTICATION_CLASSES": [
        "realm.authentication.RealmTokenAuthentication",
        "realm.authentication.SessionAuthentication",
    ],
    "UNAUTHENTICATED_USER": "django.contrib.auth.models.AnonymousUser",
    "URL_FORMAT_OVERRIDE": None,
}
JSON_API_FORMAT_FIELD_NAMES = "camelize"

# Probes and Prometheus: access, and the thresholds of the deep health check.
METRICS_TOKEN = env.text("METRICS_TOKEN")
if METRICS_TOKEN and len(METRICS_TOKEN) < 16:
    raise ImproperlyConfigured("METRICS_TOKEN needs 16 or more characters.")
OPS_ALLOWED_NETWORKS = env.networks(
    "OPS_ALLOWED_NETWORKS", "" if METRICS_TOKEN else "127.0.0.0/8,::1"
)
OPS_READY_WITHOUT_REDIS = env.flag("OPS_READY_WITHOUT_REDIS", False)
OPS_MAX_QUEUE_SECONDS = env.seconds("OPS_MAX_QUEUE_SECONDS", 60)
OPS_MAX_OUTBOX_SECONDS = env.seconds("OPS_MAX_OUTBOX_SECONDS", 30)
OPS_MAX_BOT_SYNC_SECONDS = env.seconds("OPS_MAX_BOT_SYNC_SECONDS", 90, minimum=0)  # 0: not checked
# The directory where the processes of a web server share their metrics (prometheus_client reads it).
PROMETHEUS_MULTIPROC_DIR = env.folder("PROMETHEUS_MULTIPROC_DIR")
if not PROMETHEUS_MULTIPROC_DIR:
    os.environ.pop("PROMETHEUS_MULTIPROC_DIR", None)  # set but empty would count as set

# Logs and error reports. Secrets are removed from both.
SCRUBBER = Scrubber(
    SECRET_KEY,
    REALM_SECRET_SEED,
    *SECRETS_KEY,
    OPENAI_API_KEY,
    BOT_RUNNER_PASSWORD,
    AGENT_WEBHOOK_SECRET,
    METRICS_TOKEN,
    _redis.password,
    str(_database.get("PASSWORD") or ""),
    str(_database.get("OPTIONS", {}).get("password", "")),
    os.environ.get("PGPASSWORD", ""),
)
LOGGING = logs.configuration(
    env.text("LOG_LEVELS", "*=info"),
    env.choice("LOG_FORMAT", "console" if sys.stderr.isatty() else "json", ("console", "json")),
    scrub=SCRUBBER,
)
SENTRY_DSN = env.text("SENTRY_DSN")
SENTRY_ENVIRONMENT = env.text("SENTRY_ENVIRONMENT", "development")
RELEASE = env.text("SENTRY_RELEASE", f"botrealm@{VERSION}")
if SENTRY_DSN:
    errors.report_to(SENTRY_DSN, environment=SENTRY_ENVIRONMENT, release=RELEASE, scrub=SCRUBBER)

# Security of the transport. Cookies, redirects and HSTS go together.
HTTPS = env.flag("HTTPS", not DEBUG)
SESSION_COOKIE_SECURE = CSRF_COOKIE_SECURE = SECURE_SSL_REDIRECT = HTTPS
# The platform requests these inside the network, without HTTPS.
SECURE_REDIRECT_EXEMPT = [r"^(healthz|readyz|metrics)$"]
SECURE_HSTS_SECONDS = env.integer("SECURE_HSTS_SECONDS", 30 * 24 * 3600) if HTTPS else 0
# HSTS for subdomains, and preloading, cannot be undone: the owner of the domain decides.
SILENCED_SYSTEM_CHECKS = ["security.W005", "security.W021"]
# Off by default: without a proxy that sets the header, any client can.
SECURE_PROXY_SSL_HEADER = env.proxy_header("SECURE_PROXY_SSL_HEADER")
SECURE_CONTENT_TYPE_NOSNIFF = True
SECURE_REFERRER_POLICY = "same-origin"
X_FRAME_OPTIONS = "DENY"
