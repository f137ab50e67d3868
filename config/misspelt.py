"""Find variables whose names are nearly those of settings: they have no effect, without an error.

The environment has variables of other programs, so only near misses are reported; and names only, never
values.
"""

import difflib
import logging
import os
import re
from collections.abc import Iterable

from config import env
from lib import dotenv

logger = logging.getLogger(__name__)

# Read by the local stack and by scripts, or set for its processes.
ELSEWHERE = {
    "PORT",
    "REALM_SERVER_JWT",
    "REALM_SERVER_PORT",
    "REALM_SERVER_URL",
    "STACK_DIR",
    "STACK_FORWARD",
    "STACK_FOUND",
    "STACK_HOMESERVER",
    "STACK_INSTALL_HOMESERVER",
    "STACK_MATRIX",
    "STACK_PRIVATE_REDIS",
    "STACK_PYTHON",
    "STACK_REDIS_SERVER",
    "STACK_ROOMS",
    "STACK_WORKERS",
}
# Names of other programs that look like settings: of OpenAI's library, Sentry's and web servers.
OTHERS = re.compile(
    r"OPENAI_(ORG_ID|ORGANIZATION|PROJECT_ID|ADMIN_KEY|WEBHOOK_SECRET|LOG|API_TYPE|API_VERSION)"
    r"|WEB_CONCURRENCY|DATABASE_(HOST|PORT|NAME|USER|PASSWORD)|REDIS_(HOST|PORT|PASSWORD|USER|DB)"
)
# What people call a setting whose name has other words.
USUAL = {
    "CHAT_MODEL": "CHAT_DEFAULT_MODEL",
    "DB_URL": "DATABASE_URL",
    "DJANGO_ALLOWED_HOSTS": "ALLOWED_HOSTS",
    "DJANGO_DEBUG": "DEBUG",
    "DJANGO_SECRET_KEY": "SECRET_KEY",
    "HOMESERVER_URL": "MATRIX_URL",
    "LIMIT_ROOM_RUNS_WAITING": "LIMIT_ROOM_RUNS_UNFINISHED",
    "LIMIT_USER_RUNS_WAITING": "LIMIT_USER_RUNS_UNFINISHED",
    "OPENAI_API_BASE": "OPENAI_BASE_URL",
    "OPENAI_API_URL": "OPENAI_BASE_URL",
    "OPENAI_ENDPOINT": "OPENAI_BASE_URL",
    "OPENAI_MODEL": "CHAT_DEFAULT_MODEL",
    "OPENAI_TOKEN": "OPENAI_API_KEY",
    "OPENAI_URL": "OPENAI_BASE_URL",
}
# Families of names that no other program uses: a weaker likeness is enough.
OWN = re.compile(r"(LIMIT_(USER|ROOM)|CHAT|BOT_RUNNER|RETENTION|HOOKS|OPS|AGENT_(MAX|WEBHOOK))_")
LIKENESS, LIKENESS_OWN = 0.87, 0.7


def found() -> dict[str, str]:
    """Return the misspelt variables of the environment and of `.env`, each with the setting that it
    resembles most."""
    return near_misses({*os.environ, *dotenv.names()}, env.NAMES | ELSEWHERE)


def sentences() -> list[str]:
    return [
        f"{name}{dotenv.place(name)} is no setting and has no effect: is {meant} meant?"
        for name, meant in found().items()
    ]


def log() -> None:
    """Log the misspelt variables, when a server starts."""
    for sentence in sentences():
        logger.warning(sentence)


def near_misses(names: Iterable[str], known: set[str]) -> dict[str, str]:
    misses = {}
    for name in sorted(set(names) - known):
        upper = re.sub(r"[^A-Z0-9]+", "_", name.upper()).strip("_")
        if meant := _meant(upper, known):
            misses[name] = meant
    return misses


def _meant(name: str, known: set[str]) -> str | None:
    if name in known:
        return name  # in another case, or with dashes
    if name in USUAL:
        return USUAL[name]
    # One word, such as PATH, resembles too much.
    if "_" not in name or OTHERS.fullmatch(name):
        return None
    is_own = OWN.match(name) is not None
    candidates = [each for each in known if _has_the_same_words(name, each, is_own=is_own)]
    likeness = 0.0 if candidates else LIKENESS_OWN if is_own else LIKENESS
    best = difflib.get_close_matches(name, candidates or sorted(known), n=1, cutoff=likeness)
    return best[0] if best else None


def _has_the_same_words(name: str, setting: str, *, is_own: bool) -> bool:
    """Return whether the name is the setting's without some words or letters at the end; or, in an own
    family, with more."""
    words, of_setting = name.split("_"), setting.split("_")
    if words[0] != of_setting[0]:
        return False
    if set(words) < set(of_setting) or setting.startswith(name):
        return True
    return is_own and len(of_setting) > 1 and set(words) > set(of_setting)
