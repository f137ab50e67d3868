"""Settings are read by a process that starts; so the tests start one for each environment."""

import stat
from pathlib import Path

import pytest

from tests.config.starting import ROOT, Start


@pytest.mark.parametrize(
    ("name", "value", "hint"),
    [
        ("DEBUG", "maybe", "use true or false"),
        ("CHAT_ALLOW_ANONYMOUS", "2", "use true or false"),
        ("CHAT_MEMORY_RECENT_MESSAGES", "eight", "whole number from 1 to 1000"),
        ("CHAT_MEMORY_RECENT_MESSAGES", "0", "whole number from 1 to 1000"),
        ("AGENT_MAX_LOOP_ITERATIONS", "-1", "whole number from 1 to 100"),
        ("AGENT_LEASE_SECONDS", "soon", "time in seconds"),
        ("OPENAI_BASE_URL", "localhost:11434", "http:// or https://"),
        ("REDIS_URL", "localhost:6379", "redis://"),
        ("REDIS_URL", "redis://localhost:port", "redis://"),
        ("DATABASE_URL", "mysql://localhost/x", "postgres://"),
        ("DATABASE_URL", "postgres://localhost", "names no database"),
        ("LOG_LEVELS", "*=loud", "pattern=level"),
        ("LOG_LEVELS", "info", "pattern=level"),
        ("LOG_FORMAT", "xml", "console, json"),
        ("CHAT_DEFAULT_MODEL", "m" * 101, "100 characters"),
        ("OUTGOING_PORTS", "443, 65536", "not a port from 1 to 65535"),
        ("HTTPS", "often", "use true or false"),
        ("SECURE_PROXY_SSL_HEADER", "HTTP_X=https", "such as X-Forwarded-Proto"),
        ("RETENTION_STEPS_DAYS", "-1", "whole number of 0 or more"),
        ("WORKER_GRACE_SECONDS", "long", "time in seconds"),
        ("SENTRY_DSN", "nonsense", "not a Sentry DSN"),
    ],
)
def test_a_wrong_value_stops_the_start_and_names_the_variable(
    name: str, value: str, hint: str, start: Start
) -> None:
    process = start("settings.DEBUG", **{name: value})

    assert process.returncode != 0
    last = process.stderr.strip().splitlines()[-1]
    assert last.startswith("django.core.exceptions.ImproperlyConfigured")
    assert name in last
    assert hint in last


@pytest.mark.parametrize(
    "name",
    [
        "DEBUG",
        "LOG_LEVELS",
        "LOG_FORMAT",
        "OUTGOING_PORTS",
        "OPS_ALLOWED_NETWORKS",
        "CHAT_WHEN_BUSY",
        "LIMIT_USER_COST_PER_DAY",
        "BOT_RUNNER_MAX_EVENT_AGE",
        "REDIS_URL",
        "REDIS_CA_FILE",
        "DATABASE_URL",
        "DATABASE_PGBOUNCER",
        "MATRIX_URL",
        "OPENAI_BASE_URL",
        "SENTRY_DSN",
        "SECURE_PROXY_SSL_HEADER",
        "FORCE_SCRIPT_NAME",
    ],
)
@pytest.mark.parametrize("value", ["sk=canary", "postgres://me:1/canary@host/name"])
def test_the_error_does_not_show_the_value(name: str, value: str, start: Start) -> None:
    process = start("settings.DEBUG", **{name: value})

    assert process.returncode != 0
    last = process.stderr.strip().splitlines()[-1]
    assert last.startswith("django.core.exceptions.ImproperlyConfigured")
    assert name in last
    assert "canary" not in last


@pytest.mark.parametrize("value", ["/api", "/admin/x", "bots", "/a b", "/../x", "/_x", "https://x"])
def test_a_path_that_cannot_be_in_front(value: str, start: Start) -> None:
    process = start("settings.DEBUG", FORCE_SCRIPT_NAME=value)

    assert "FORCE_SCRIPT_NAME" in process.stderr.splitlines()[-1]


@pytest.mark.parametrize("value", ["/bots", "/bots/", "/a/b-c/"])
def test_a_path_in_front(value: str, start: Start) -> None:
    process = start("settings.STATIC_URL, settings.CSRF_COOKIE_PATH", FORCE_SCRIPT_NAME=value)

    prefix = value.rstrip("/")
    assert process.stdout.strip() == str((f"{prefix}/static/", prefix))


class TestUnusedSecrets:
    """A worker and the bot runner do without what only the web server signs with."""

    ENV = {"DEBUG": "false", "SECRET_KEY": "unused", "REALM_SECRET_SEED": "unused"} | {
        "SECRETS_KEY": "s" * 50
    }

    def test_a_random_value_takes_the_place_of_each(self, start: Start) -> None:
        values = "settings.SECRET_KEY, settings.REALM_SECRET_SEED"
        found = {start(f"{values}", **self.ENV).stdout for _ in range(2)}
        assert len(found) == 2
        assert all(len(line) > 100 and "unused" not in line for line in found)

    def test_secrets_at_rest_need_their_own_key_then(self, start: Start) -> None:
        process = start("settings.DEBUG", **(self.ENV | {"SECRETS_KEY": ""}))
        assert process.returncode != 0
        assert "SECRETS_KEY is required if SECRET_KEY is unused" in process.stderr

    def test_the_web_server_does_not_start(self, start: Start) -> None:
        process = start("__import__('config.asgi')", **self.ENV)
        assert process.returncode != 0
        assert "SECRET_KEY and REALM_SECRET_SEED: the web server signs" in process.stderr


@pytest.mark.parametrize("name", ["SECRET_KEY", "REALM_SECRET_SEED"])
@pytest.mark.parametrize("value", ["", "short"])
def test_what_can_be_guessed_is_no_secret(name: str, value: str, start: Start) -> None:
    """Refused by the settings themselves: a server and a worker read those, and run no checks."""
    secrets = {"SECRET_KEY": "a" * 50, "REALM_SECRET_SEED": "b" * 50} | {name: value}
    process = start("settings.DEBUG", DEBUG="false", **secrets)

    assert process.returncode != 0
    assert f"ImproperlyConfigured: {name} is the built-in value" in process.stderr
    assert start("settings.DEBUG", DEBUG="true", **secrets).stdout.strip() == "True"


def test_a_password_in_a_wrong_url_is_not_shown(start: Start) -> None:
    process = start("settings.DEBUG", REDIS_URL="http://:canary@localhost")

    assert "REDIS_URL" in process.stderr
    assert "canary" not in process.stderr


def test_the_defaults_are_those_of_the_documents(start: Start) -> None:
    names = [
        "REDIS_URL",
        "REDIS_STREAM_KEY",
        "REDIS_CONSUMER_GROUP",
        "CHAT_DEFAULT_MODEL",
        "CHAT_ALLOWED_MODELS",
        "CHAT_MEMORY_RECENT_MESSAGES",
        "SENTRY_ENVIRONMENT",
    ]
    # Set but empty is as good as not set; and a developer's .env must not decide this test.
    process = start(f"[getattr(settings, n) for n in {names}]", **dict.fromkeys(names, ""))

    assert process.stdout.strip() == str(
        [
            "redis://localhost:6379",
            "agent_events",
            "agent_runtime",
            "gpt-4o-mini",
            [],
            8,
            "development",
        ]
    )


def test_a_default_model_outside_of_the_list_falls_back_to_the_lists_first(start: Start) -> None:
    process = start(
        "settings.CHAT_DEFAULT_MODEL",
        CHAT_ALLOWED_MODELS="gpt-4o, o3",
        CHAT_DEFAULT_MODEL="gpt-4o-mini",
    )

    assert process.stdout.strip() == "gpt-4o"


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("file:./db/other.db", str(ROOT / "db/other.db")),
        ("file:/tmp/botrealm-x.db", "/tmp/botrealm-x.db"),
        ("sqlite:////tmp/botrealm-x.db", "/tmp/botrealm-x.db"),
        ("postgres://u:p@localhost:5432/chat", "chat"),
        ("postgresql://u@localhost/chat", "chat"),
    ],
)
def test_database_urls(url: str, name: str, start: Start) -> None:
    process = start("settings.DATABASES['default']['NAME']", DATABASE_URL=url)

    assert process.stdout.strip() == name


def test_a_folder_made_for_the_database_is_its_owners_alone(tmp_path: Path, start: Start) -> None:
    folder = tmp_path / "db"
    process = start("settings.DEBUG", DATABASE_URL=f"sqlite:///{folder}/sqlite.db")

    assert process.returncode == 0, process.stderr
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
