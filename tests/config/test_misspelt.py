"""Near misses of the names of settings, and names of other programs."""

import re

import pytest

from config import env, misspelt
from tests.config.starting import Start
from tests.docs.blocks import ROOT

KNOWN = env.NAMES | misspelt.ELSEWHERE
# Of a shell, a desktop, a container, a CI, a cloud and other libraries.
UNRELATED = (ROOT / "tests/config/unrelated_names.txt").read_text().split()


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("OPENAI_KEY", "OPENAI_API_KEY"),
        ("OPENAI_APIKEY", "OPENAI_API_KEY"),
        ("OPENAI_API_KEYS", "OPENAI_API_KEY"),
        ("OPEN_AI_API_KEY", "OPENAI_API_KEY"),
        ("OPENAI_API_BASE", "OPENAI_BASE_URL"),
        ("OPENAI_BASEURL", "OPENAI_BASE_URL"),
        ("OPENAI_TIMEOUT", "OPENAI_TIMEOUT_SECONDS"),
        ("OPENAI_MODEL", "CHAT_DEFAULT_MODEL"),
        ("CHAT_DEFAULT_MODLE", "CHAT_DEFAULT_MODEL"),
        ("CHAT_MODEL", "CHAT_DEFAULT_MODEL"),
        ("CHAT_ALLOWED_MODEL", "CHAT_ALLOWED_MODELS"),
        ("chat_default_model", "CHAT_DEFAULT_MODEL"),
        ("CHAT-DEFAULT-MODEL", "CHAT_DEFAULT_MODEL"),
        ("Debug", "DEBUG"),
        ("LIMIT_USER_MESSAGES", "LIMIT_USER_MESSAGES_PER_MINUTE"),
        ("LIMIT_USER_MESSAGE_PER_MINUTE", "LIMIT_USER_MESSAGES_PER_MINUTE"),
        ("LIMIT_USER_RUNS_WAITING", "LIMIT_USER_RUNS_UNFINISHED"),
        ("LIMIT_ROOM_TOKENS_A_DAY", "LIMIT_ROOM_TOKENS_PER_DAY"),
        ("LIMIT_USERS_TOKENS_PER_DAY", "LIMIT_USER_TOKENS_PER_DAY"),
        ("LIMITS_USER_COST_PER_DAY", "LIMIT_USER_COST_PER_DAY"),
        ("AGNET_TOOLS", "AGENT_TOOLS"),
        ("AGENT_TOOL", "AGENT_TOOLS"),
        ("ALLOWED_HOST", "ALLOWED_HOSTS"),
        ("DATABASE_URI", "DATABASE_URL"),
        ("DATABSE_URL", "DATABASE_URL"),
        ("REDIS_URI", "REDIS_URL"),
        ("REDISURL", None),
        ("MATRIX_HOMESERVER", None),
        ("SECRET_KEYS", "SECRET_KEY"),
        ("DJANGO_SECRET_KEY", "SECRET_KEY"),
        ("REALM_SECRET", "REALM_SECRET_SEED"),
        ("BOT_RUNNER_PASS", "BOT_RUNNER_PASSWORD"),
        ("BOTRUNNER_PASSWORD", "BOT_RUNNER_PASSWORD"),
        ("RETENTION_STEP_DAYS", "RETENTION_STEPS_DAYS"),
        ("LOG_LEVEL", "LOG_LEVELS"),
        ("STACK_WORKER", "STACK_WORKERS"),
        ("SENTRY_ENV", "SENTRY_ENVIRONMENT"),
        ("WORKER_CONCURENCY", "WORKER_CONCURRENCY"),
    ],
)
def test_a_near_miss(name: str, meant: str | None) -> None:
    assert misspelt.near_misses({name}, KNOWN) == ({name: meant} if meant else {})


def test_names_of_other_programs_are_none() -> None:
    assert misspelt.near_misses(UNRELATED, KNOWN) == {}


@pytest.mark.parametrize("path", ["docs", "deploy", ".env.example", "compose.yaml", "README.md"])
def test_no_documented_name_is_one(path: str) -> None:
    files = [ROOT / path] if (ROOT / path).is_file() else (ROOT / path).rglob("*.*")
    texts = [file.read_text() for file in files if file.suffix in ("", ".md", ".yaml", ".example")]
    documented = set(re.findall(r"\b[A-Z]+(?:_[A-Z]+)+(?=[=`:])", "\n".join(texts)))

    assert documented
    assert misspelt.near_misses(documented, KNOWN) == {}


def test_a_server_logs_it_without_the_value(start: Start) -> None:
    process = start("__import__('config.asgi')", OPENAI_KEY="sk-canary-0123456789", DEBUG="true")

    assert "OPENAI_KEY is no setting and has no effect: is OPENAI_API_KEY meant?" in process.stderr
    assert "canary" not in process.stderr
