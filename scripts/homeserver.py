"""Synapse as a homeserver on loopback: its configuration, its accounts, and the local stack's own.

The tests start theirs from the same configuration (tests/synapse.py).
"""

import hashlib
import hmac
import json
import os
import secrets
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

SERVER_NAME = "localhost"
PORT = 8008
DEMO_USER = "demo"
# Loopback needs no proxy; the environment may name one.
OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class CallFailed(Exception):
    def __init__(self, status: int, body: dict[str, Any]) -> None:
        super().__init__(f"{status} {body}")
        self.status = status
        self.body = body


def configuration(directory: Path, port: int, keys: dict[str, str]) -> dict[str, Any]:
    """Return a configuration with all files in `directory`, no federation and no delays."""
    return {
        "server_name": SERVER_NAME,
        "pid_file": str(directory / "homeserver.pid"),
        "listeners": [
            {
                "port": port,
                "bind_addresses": ["127.0.0.1"],
                "type": "http",
                "resources": [{"names": ["client", "openid"]}],
            }
        ],
        "database": {"name": "sqlite3", "args": {"database": str(directory / "homeserver.db")}},
        "log_config": str(directory / "log.yaml"),
        "media_store_path": str(directory / "media"),
        "signing_key_path": str(directory / "signing.key"),
        **keys,
        "report_stats": False,
        "federation_domain_whitelist": [],
        "trusted_key_servers": [],
        "suppress_key_server_warning": True,
        "presence": {"enabled": False},
        "url_preview_enabled": False,
        "bcrypt_rounds": 4,
        # A restarted client would receive its predecessor's cached response.
        "caches": {"sync_response_cache_duration": "0s"},
    }


def no_limits() -> dict[str, Any]:
    """Return limits that do not bind. By default a bot may send one message in five seconds, and be
    invited once in five minutes."""
    free = {"per_second": 10_000, "burst_count": 10_000}
    return {
        "rc_message": free,
        "rc_registration": free,
        "rc_login": {"address": free, "account": free, "failed_attempts": free},
        "rc_joins": {"local": free, "remote": free},
        "rc_joins_per_room": free,
        "rc_invites": {"per_room": free, "per_user": free, "per_issuer": free},
        "rc_room_creation": free,
        "rc_key_requests": free,
        "rc_admin_redaction": free,
    }


def new_keys() -> dict[str, str]:
    names = ("registration_shared_secret", "macaroon_secret_key", "form_secret")
    return {name: secrets.token_hex(16) for name in names}


def write(directory: Path, config: dict[str, Any]) -> None:
    """Write the configuration as JSON, which is YAML."""
    logs = {
        "version": 1,
        "handlers": {"console": {"class": "logging.StreamHandler"}},
        "root": {"level": "WARNING", "handlers": ["console"]},
        "disable_existing_loggers": False,
    }
    (directory / "log.yaml").write_text(json.dumps(logs))
    path = directory / "homeserver.yaml"
    path.unlink(missing_ok=True)
    path.touch(mode=0o600)
    path.write_text(json.dumps(config, indent=1))


def written(directory: Path) -> dict[str, Any]:
    """Return the configuration of an earlier start; empty before the first."""
    try:
        return dict(json.loads((directory / "homeserver.yaml").read_text()))
    except (FileNotFoundError, json.JSONDecodeError):
        return {}


def port_of(config: dict[str, Any]) -> int:
    return int(config["listeners"][0]["port"]) if config else PORT


def prepare(directory: Path, port: int) -> None:
    """Rewrite the configuration of the stack's homeserver, with the keys that it has."""
    directory.mkdir(mode=0o700, exist_ok=True)
    before = written(directory)
    keys = {name: before.get(name, key) for name, key in new_keys().items()}
    write(directory, configuration(directory, port, keys) | no_limits())
    password = directory / "demo-password"
    if not password.exists():
        password.touch(mode=0o600)
        password.write_text(f"{secrets.token_urlsafe(12)}\n")


def demo_password(directory: Path) -> str:
    return (directory / "demo-password").read_text().strip()


def call(
    url: str, method: str, path: str, token: str = "", body: Any = None, *, timeout: float = 60
) -> dict[str, Any]:
    """Call a homeserver and return its response. Raises `CallFailed`, `OSError`."""
    data = None if body is None and method == "GET" else json.dumps(body or {}).encode()
    request = urllib.request.Request(f"{url}{path}", data=data, method=method)  # noqa: S310
    request.add_header("Content-Type", "application/json")
    if token:
        request.add_header("Authorization", f"Bearer {token}")
    try:
        with OPENER.open(request, timeout=timeout) as answer:
            return dict(json.load(answer))
    except urllib.error.HTTPError as error:
        raise CallFailed(error.code, json.loads(error.read() or b"{}")) from None


def is_healthy(url: str) -> bool:
    try:
        with OPENER.open(f"{url}/health", timeout=2) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def register(
    url: str, secret: str, name: str, password: str, *, admin: bool = False
) -> dict[str, Any]:
    """Create an account and return the response of a login. Raises `CallFailed`."""
    path = "/_synapse/admin/v1/register"
    nonce = call(url, "GET", path)["nonce"]
    parts = [nonce, name, password, "admin" if admin else "notadmin"]
    mac = hmac.new(secret.encode(), "\0".join(parts).encode(), hashlib.sha1).hexdigest()
    body = {"nonce": nonce, "username": name, "password": password, "admin": admin, "mac": mac}
    return call(url, "POST", path, body=body)


def create_accounts(directory: Path) -> None:
    """Create the accounts of the bot and the demo user, as soon as the stack's homeserver answers.
    Raises `CallFailed`, `OSError`."""
    url, secret = os.environ["MATRIX_URL"], written(directory)["registration_shared_secret"]
    while not is_healthy(url):
        time.sleep(0.1)
    bot = os.environ["BOT_RUNNER_USERNAME"]
    _ensure(url, secret, bot, os.environ["BOT_RUNNER_PASSWORD"], admin=True)
    _ensure(url, secret, DEMO_USER, demo_password(directory))


def _ensure(url: str, secret: str, name: str, password: str, *, admin: bool = False) -> None:
    localpart = name.removeprefix("@").partition(":")[0]
    try:
        register(url, secret, localpart, password, admin=admin)
    except CallFailed as error:
        if error.body.get("errcode") != "M_USER_IN_USE":
            raise
