"""Read settings from the environment. An invalid value stops the start with the variable's name."""

import ipaddress
import os
import re
import secrets
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import environ
from django.core.exceptions import ImproperlyConfigured

from lib import dotenv, redis

UNUSED = "unused"
TRUE = {"1", "true", "yes", "on"}
FALSE = {"0", "false", "no", "off"}


# Every variable that the settings read.
NAMES: set[str] = set()


def text(name: str, default: str = "") -> str:
    """Return the variable without surrounding blanks. An empty one counts as not set."""
    NAMES.add(name)
    return os.environ.get(name, "").strip() or default


def load(path: Path) -> None:
    """Read the file `.env`, which the environment overrides."""
    try:
        dotenv.load(path)
    except dotenv.InvalidFile as error:
        raise ImproperlyConfigured(str(error)) from None


def invalid(name: str, problem: str) -> ImproperlyConfigured:
    """Return the error for a variable: with its place in `.env`, and without its value, which may be a
    secret in the wrong line."""
    return ImproperlyConfigured(f"{name}{dotenv.place(name)} {problem}")


def signing_secret(name: str, default: str) -> str:
    """Return a secret. `unused` keeps it from a process that signs nothing: a random value replaces
    it, whose signatures no other process accepts."""
    return secrets.token_urlsafe(48) if text(name) == UNUSED else text(name, default)


def unused_secrets(*names: str) -> list[str]:
    return [name for name in names if text(name) == UNUSED]


def flag(name: str, default: bool) -> bool:
    value = text(name).lower()
    if not value:
        return default
    if value in TRUE | FALSE:
        return value in TRUE
    raise invalid(name, "is not a switch: use true or false.")


def integer(name: str, default: int, *, minimum: int = 0, maximum: int | None = None) -> int:
    value = text(name)
    if not value:
        return default
    bounds = f"from {minimum} to {maximum}" if maximum is not None else f"of {minimum} or more"
    try:
        number = int(value)
    except ValueError:
        number = minimum - 1
    if number < minimum or (maximum is not None and number > maximum):
        raise invalid(name, f"is not a whole number {bounds}.")
    return number


def seconds(name: str, default: float, *, minimum: float = 0.1) -> float:
    value = text(name)
    if not value:
        return default
    try:
        number = float(value)
    except ValueError:
        number = float("nan")
    if not minimum <= number < float("inf"):
        raise invalid(name, f"is not a time in seconds of {minimum} or more.")
    return number


def seconds_or_never(name: str, default: float) -> float | None:
    """Return a time of 0 or more; None for `never`."""
    if text(name).lower() == "never":
        return None
    try:
        return seconds(name, default, minimum=0)
    except ImproperlyConfigured:
        raise ImproperlyConfigured(
            f"{name}={text(name)!r} is not a time in seconds of 0 or more, nor 'never'."
        ) from None


def amount(name: str) -> Decimal:
    """Return an amount of money; 0 if it is not set."""
    value = text(name, "0")
    try:
        number = Decimal(value)
    except InvalidOperation:
        number = Decimal("NaN")
    if not (number.is_finite() and 0 <= number <= 1_000_000):
        raise invalid(name, "is not an amount from 0 to 1000000.")
    return number


def words(name: str, default: str = "") -> list[str]:
    """Return a comma-separated list without blanks and empty entries."""
    return [word.strip() for word in text(name, default).split(",") if word.strip()]


def ports(name: str, default: str) -> frozenset[int]:
    """Return TCP ports, comma-separated."""
    values = words(name, default)
    for word in values:
        if not (word.isascii() and word.isdigit() and 1 <= int(word[:6]) <= 65535):
            raise invalid(name, "has an entry that is not a port from 1 to 65535.")
    return frozenset(map(int, values))


# The first parts of the server's own paths.
OWN_PATHS = re.compile(
    r"/(_.*|api|admin|login|logout|static|threads|runs|healthz|readyz|metrics)(/|\Z)"
)


def path_prefix(name: str) -> str | None:
    """Return a path without a slash at its end; None if it is not set."""
    value = text(name).rstrip("/")
    if not value:
        return None
    if not re.fullmatch(r"(/[A-Za-z0-9._~-]+)+", value) or {".", ".."} & set(value.split("/")):
        raise invalid(name, "is not a path such as /bots.")
    if OWN_PATHS.match(value):
        raise invalid(name, "begins as a path of the server itself: use another, such as /bots.")
    return value


def networks(name: str, default: str = "") -> list[ipaddress.IPv4Network | ipaddress.IPv6Network]:
    """Return addresses and CIDR blocks, comma-separated."""
    blocks = []
    for word in words(name, default):
        try:
            blocks.append(ipaddress.ip_network(word, strict=False))
        except ValueError:
            raise invalid(
                name, "has an entry that is not an address or a network such as 10.0.0.0/8."
            ) from None
    return blocks


def choice(name: str, default: str, choices: tuple[str, ...]) -> str:
    value = text(name, default)
    if value not in choices:
        raise invalid(name, f"is not one of {', '.join(filter(None, choices))}.")
    return value


def url(name: str, default: str = "", *, schemes: tuple[str, ...]) -> str:
    value = text(name, default)
    if not value:
        return ""
    try:
        parts = urlsplit(value)
        valid = parts.scheme in schemes and bool(parts.hostname or parts.path.strip("/"))
        _ = parts.port
    except ValueError:
        valid = False
    if not valid:
        raise invalid(
            name, f"is not a URL that starts with {' or '.join(f'{s}://' for s in schemes)}."
        )
    return value


def file(name: str) -> str:
    """Return the path of a readable file; empty if it is not set."""
    value = text(name)
    if not value:
        return ""
    try:
        Path(value).open("rb").close()
    except OSError as error:
        raise invalid(name, f"names a file that cannot be read: {error.strerror}.") from None
    return value


def folder(name: str) -> str:
    """Return the path of a folder, which is created; empty if it is not set."""
    value = text(name)
    if value:
        make_folder(name, Path(value))
    return value


def make_folder(name: str, path: Path, mode: int = 0o777) -> None:
    """Create the folder that the variable names."""
    try:
        path.mkdir(mode=mode, parents=True, exist_ok=True)
    except OSError as error:
        raise invalid(name, f"names a folder that cannot be created: {error.strerror}.") from None


def redis_server(url: str, *, ca_file: str, cert_file: str, key_file: str) -> redis.RedisServer:
    """Return the Redis server of REDIS_URL and its certificates."""
    try:
        server = redis.parse(url, ca_file=ca_file, cert_file=cert_file, key_file=key_file)
        if server.tls:
            server.tls.context()
    except redis.InvalidConfiguration as error:
        raise ImproperlyConfigured(f"{error}{dotenv.place('REDIS_URL')}") from None
    return server


def proxy_header(name: str) -> tuple[str, str] | None:
    """Return the header that a proxy sets for HTTPS requests, as Django expects it."""
    value = text(name)
    if not value:
        return None
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9-]*", value):
        raise invalid(name, "is not a header such as X-Forwarded-Proto.")
    return "HTTP_" + value.upper().replace("-", "_"), "https"


def database(name: str, default: str, *, base: Path) -> dict[str, Any]:
    """Return Django's settings for a database URL.

    `file:PATH` is the form of the chat server's specification for SQLite; a relative path starts at
    `base`. `sqlite:///PATH` and `postgres://...` are the usual forms.
    """
    value = text(name, default)
    if value.startswith("file:"):
        path = base / value.removeprefix("file:").split("?")[0]
        return {"ENGINE": "config.server.sqlite", "NAME": str(path)}
    if not re.match(r"(sqlite|postgres|postgresql)://", value):
        raise invalid(
            name,
            "is not a database URL: use file:./db/sqlite.db, sqlite:///absolute/path "
            "or postgres://user:password@host:5432/name.",
        )
    try:
        config = dict(environ.Env.db_url_config(value))
    except (ValueError, ImproperlyConfigured):
        config = {"NAME": "@"}
    if not config.get("NAME"):
        raise invalid(name, "names no database.")
    if "@" in str(config["NAME"]):
        # The rest of a password with a `/`.
        raise invalid(
            name,
            "cannot be read as a database URL: percent-encode any of / ? # @ : in a user or password.",
        )
    if "sqlite" in config["ENGINE"]:
        config["ENGINE"] = "config.server.sqlite"
        if config["NAME"] != ":memory:":
            config["NAME"] = str(base / config["NAME"])
    else:
        config["ENGINE"] = "config.server.postgresql"
    return config
