"""Read settings from the environment; a bad value stops the start with the variable's name."""

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

from lib import redis

UNUSED = "unused"
TRUE = {"1", "true", "yes", "on"}
FALSE = {"0", "false", "no", "off"}


def text(name: str, default: str = "") -> str:
    """The variable without surrounding blanks. Set but empty counts as not set."""
    return os.environ.get(name, "").strip() or default


def signing_secret(name: str, default: str) -> str:
    """Return a secret. `unused` keeps it from a process that signs nothing: a random value, with
    which it signs nothing that another process accepts, takes its place."""
    return secrets.token_urlsafe(48) if text(name) == UNUSED else text(name, default)


def unused_secrets(*names: str) -> list[str]:
    return [name for name in names if text(name) == UNUSED]


def flag(name: str, default: bool) -> bool:
    value = text(name).lower()
    if not value:
        return default
    if value in TRUE | FALSE:
        return value in TRUE
    raise ImproperlyConfigured(f"{name}={value!r} is not a switch: use true or false.")


def integer(name: str, default: int, *, least: int = 0, most: int | None = None) -> int:
    value = text(name)
    if not value:
        return default
    bounds = f"from {least} to {most}" if most is not None else f"of {least} or more"
    try:
        number = int(value)
    except ValueError:
        number = least - 1
    if number < least or (most is not None and number > most):
        raise ImproperlyConfigured(f"{name}={value!r} is not a whole number {bounds}.")
    return number


def seconds(name: str, default: float, *, least: float = 0.1) -> float:
    value = text(name)
    if not value:
        return default
    try:
        number = float(value)
    except ValueError:
        number = float("nan")
    if not least <= number < float("inf"):
        raise ImproperlyConfigured(f"{name}={value!r} is not a time in seconds of {least} or more.")
    return number


def amount(name: str) -> Decimal:
    """Money; 0 where it is not set."""
    value = text(name, "0")
    try:
        number = Decimal(value)
    except InvalidOperation:
        number = Decimal("NaN")
    if not (number.is_finite() and 0 <= number <= 1_000_000):
        raise ImproperlyConfigured(f"{name}={value!r} is not an amount from 0 to 1000000.")
    return number


def words(name: str, default: str = "") -> list[str]:
    """A comma-separated list, blanks and empty entries dropped."""
    return [word.strip() for word in text(name, default).split(",") if word.strip()]


def ports(name: str, default: str) -> frozenset[int]:
    """TCP ports, comma-separated."""
    found = words(name, default)
    for word in found:
        if not (word.isascii() and word.isdigit() and 1 <= int(word[:6]) <= 65535):
            raise ImproperlyConfigured(f"{name}: {word!r} is not a port from 1 to 65535.")
    return frozenset(map(int, found))


def networks(name: str, default: str = "") -> list[ipaddress.IPv4Network | ipaddress.IPv6Network]:
    """Addresses and CIDR blocks, comma-separated."""
    found = []
    for word in words(name, default):
        try:
            found.append(ipaddress.ip_network(word, strict=False))
        except ValueError:
            raise ImproperlyConfigured(
                f"{name}: {word!r} is not an address or a network such as 10.0.0.0/8."
            ) from None
    return found


def choice(name: str, default: str, choices: tuple[str, ...]) -> str:
    value = text(name, default)
    if value not in choices:
        raise ImproperlyConfigured(f"{name}={value!r} is not one of {', '.join(choices)}.")
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
        # The value may carry a password, so it is not repeated.
        raise ImproperlyConfigured(
            f"{name} is not a URL that starts with {' or '.join(f'{s}://' for s in schemes)}."
        )
    return value


def file(name: str) -> str:
    """The path of a file that can be read; empty where it is not set."""
    value = text(name)
    if not value:
        return ""
    try:
        Path(value).open("rb").close()
    except OSError as error:
        raise ImproperlyConfigured(f"{name}: {value} cannot be read: {error.strerror}.") from None
    return value


def redis_server(url: str, *, ca_file: str, cert_file: str, key_file: str) -> redis.Server:
    """The Redis that REDIS_URL and its certificates name."""
    try:
        server = redis.parse(url, ca_file=ca_file, cert_file=cert_file, key_file=key_file)
        if server.tls:
            server.tls.context()
    except redis.Invalid as error:
        raise ImproperlyConfigured(str(error)) from None
    return server


def proxy_header(name: str) -> tuple[str, str] | None:
    """The header by which a proxy tells that it was asked by HTTPS, as Django wants it."""
    value = text(name)
    if not value:
        return None
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9-]*", value):
        raise ImproperlyConfigured(f"{name}={value!r} is not a header such as X-Forwarded-Proto.")
    return "HTTP_" + value.upper().replace("-", "_"), "https"


def database(name: str, default: str, *, base: Path) -> dict[str, Any]:
    """Django's settings for a database URL.

    `file:PATH` is the spelling of the chat server's document for SQLite; a relative path counts from
    `base`. `sqlite:///PATH` and `postgres://...` are the usual ones.
    """
    value = text(name, default)
    if value.startswith("file:"):
        path = base / value.removeprefix("file:").split("?")[0]
        return {"ENGINE": "config.server.sqlite", "NAME": str(path)}
    if not re.match(r"(sqlite|postgres|postgresql)://", value):
        raise ImproperlyConfigured(
            f"{name} is not a database URL: use file:./db/sqlite.db, sqlite:///absolute/path "
            "or postgres://user:password@host:5432/name."
        )
    try:
        config = dict(environ.Env.db_url_config(value))
    except (ValueError, ImproperlyConfigured):
        raise ImproperlyConfigured(f"{name} cannot be read as a database URL.") from None
    if not config.get("NAME"):
        raise ImproperlyConfigured(f"{name} names no database.")
    if "sqlite" in config["ENGINE"]:
        config["ENGINE"] = "config.server.sqlite"
        if config["NAME"] != ":memory:":
            config["NAME"] = str(base / config["NAME"])
    return config
