"""The project's settings, cut off from the developer's environment."""

import os
import tempfile

_KEEP = {"DATABASE_URL"}
_OURS = (
    "CHAT_",
    "REDIS_",
    "OPENAI_",
    "AGENT_",
    "REALM_",
    "SENTRY_",
    "LOG_",
    "OPS_",
    "METRICS_",
    "PROMETHEUS_",
    "SECURE_",
    "STATIC_",
    "AXES_",
    "ADMIN_",
    "HOOKS_",
    "OUTGOING_",
    "RETENTION_",
    "LIMIT_",
    "SERVER_SESSIONS_",
    "LOGIN_TRIES_",
    "WEB_MAX_",
)
for _name in list(os.environ):
    if _name not in _KEEP and (
        _name.startswith(_OURS) or _name in {"DEBUG", "SECRET_KEY", "ALLOWED_HOSTS"}
    ):
        del os.environ[_name]
# Set, so that a developer's .env does not decide what is tested.
os.environ |= {
    "DEBUG": "false",
    "HTTPS": "false",
    "SECRET_KEY": "tests-only-secret-key-0123456789-0123456789-0123456789",
    "SECRETS_KEY": "tests-only-secrets-key-0123456789-0123456789-0123456789",
    "REALM_SECRET_SEED": "tests-only-realm-seed-0123456789-0123456789-0123456789",
    "CHAT_ALLOW_ANONYMOUS": "true",
    "LOG_LEVELS": "*=info",
    "LOG_FORMAT": "json",
    "CHAT_DEFAULT_MODEL": "gpt-4o-mini",
    "CHAT_ALLOWED_MODELS": "",
    "CHAT_SUMMARY_MODEL": "",
    "OPENAI_API_KEY": "",
    "OPENAI_BASE_URL": "",
    "REDIS_URL": "redis://127.0.0.1:1",
    # Many tests ask more within a moment than one user would; those of the limits set their own.
    "LIMIT_USER_MESSAGES_PER_MINUTE": "0",
    "LIMIT_USER_RUNS_UNFINISHED": "0",
    "LIMIT_USER_BYTES_PER_DAY": "0",
    "LIMIT_ROOM_MESSAGES_PER_MINUTE": "0",
    "LIMIT_ROOM_RUNS_UNFINISHED": "0",
    "LIMIT_ROOM_BYTES_PER_DAY": "0",
    "AGENT_USER_SHARE": "100",
    # Many tests come from one address within a minute.
    "SERVER_SESSIONS_PER_MINUTE": "0",
    "LOGIN_TRIES_PER_MINUTE": "0",
}
# A file, as in production: threads of a test have connections of their own. The name is that of a file
# from the start, for pytest-django shares one connection between threads where it is `:memory:`.
_folder = tempfile.TemporaryDirectory(prefix="botrealm-tests-")
os.environ.setdefault("DATABASE_URL", f"sqlite:///{_folder.name}/unused.sqlite")

from config.settings import *  # noqa: E402, F403
from config.settings import DATABASES, MIDDLEWARE  # noqa: E402

PASSWORD_HASHERS = ["django.contrib.auth.hashers.MD5PasswordHasher"]
# Four times as often a heart beats, which sees no run that the transaction of a test keeps to itself
# and would take it for lost. Tests of the lease set their own. Not for the processes of a test.
AGENT_LEASE_SECONDS = 600.0
MIDDLEWARE = [name for name in MIDDLEWARE if "whitenoise" not in name]
if "sqlite" in DATABASES["default"]["ENGINE"]:
    DATABASES["default"]["TEST"] = {"NAME": f"{_folder.name}/test.sqlite"}
