"""A real homeserver for tests: Synapse on loopback, with SQLite, up in seconds.

    with Synapse(directory) as homeserver:
        alice = homeserver.register("alice")  # .user_id, .token, .device_id
        homeserver.call("POST", "/_matrix/client/v3/createRoom", alice.token, {})

It is started by SYNAPSE_PYTHON, or by the Python that runs the tests: wherever matrix-synapse is
installed.
"""

from __future__ import annotations

import functools
import hashlib
import hmac
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

START_SECONDS = 60
CLIENT = "/_matrix/client/v3"
T = TypeVar("T")


class CallFailed(Exception):
    def __init__(self, status: int, body: dict[str, Any]) -> None:
        super().__init__(f"{status} {body}")
        self.status = status
        self.body = body


@functools.cache
def installed() -> bool:
    """Whether there is a Synapse to start."""
    found = subprocess.run([_python(), "-c", "import synapse"], capture_output=True, check=False)
    return found.returncode == 0


def _python() -> str:
    return os.environ.get("SYNAPSE_PYTHON") or sys.executable


@dataclass(frozen=True)
class Account:
    user_id: str
    token: str
    device_id: str
    password: str


class Synapse:
    def __init__(self, directory: Path, *, default_limits: bool = False) -> None:
        self.directory = directory
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.secret = secrets.token_hex(16)
        self.default_limits = default_limits
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        config = self._config()
        (self.directory / "homeserver.yaml").write_text(json.dumps(config))
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def start(self) -> None:
        with (self.directory / "output.log").open("ab") as output:
            self._process = subprocess.Popen(
                [_python(), "-m", "synapse.app.homeserver", "-c", "homeserver.yaml"],
                cwd=self.directory,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        wait_for("Synapse to answer", self._healthy, START_SECONDS)

    def stop(self, signum: int = signal.SIGTERM) -> None:
        if self._process is not None:
            self._process.send_signal(signum)
            self._process.wait(30)
            self._process = None

    def _healthy(self) -> bool:
        assert self._process is not None
        if self._process.poll() is not None:
            raise AssertionError((self.directory / "output.log").read_text()[-3000:])
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=2) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def register(self, name: str, password: str = "password", *, admin: bool = False) -> Account:
        path = "/_synapse/admin/v1/register"
        nonce = self.call("GET", path)["nonce"]
        parts = [nonce, name, password, "admin" if admin else "notadmin"]
        mac = hmac.new(self.secret.encode(), "\0".join(parts).encode(), hashlib.sha1).hexdigest()
        answer = self.call(
            "POST",
            path,
            body={
                "nonce": nonce,
                "username": name,
                "password": password,
                "admin": admin,
                "mac": mac,
            },
        )
        return Account(answer["user_id"], answer["access_token"], answer["device_id"], password)

    def call(
        self, method: str, path: str, token: str = "", body: Any = None, *, timeout: float = 60
    ) -> dict[str, Any]:
        """The answer of a call; raises `CallFailed`."""
        data = None if body is None and method == "GET" else json.dumps(body or {}).encode()
        request = urllib.request.Request(f"{self.url}{path}", data=data, method=method)
        request.add_header("Content-Type", "application/json")
        if token:
            request.add_header("Authorization", f"Bearer {token}")
        try:
            with urllib.request.urlopen(request, timeout=timeout) as answer:
                return dict(json.load(answer))
        except urllib.error.HTTPError as error:
            raise CallFailed(error.code, json.loads(error.read() or b"{}")) from None

    def create_room(self, account: Account, invite: list[str] | None = None, **extra: Any) -> str:
        body = {"preset": "private_chat", "invite": invite or [], **extra}
        return str(self.call("POST", f"{CLIENT}/createRoom", account.token, body)["room_id"])

    def send(
        self,
        account: Account,
        room_id: str,
        content: dict[str, Any] | str,
        event_type: str = "m.room.message",
    ) -> str:
        """The id of the event."""
        if isinstance(content, str):
            content = {"msgtype": "m.text", "body": content}
        path = f"{CLIENT}/rooms/{_quoted(room_id)}/send/{event_type}/{secrets.token_hex(8)}"
        return str(self.call("PUT", path, account.token, content)["event_id"])

    def override_limit(self, account: Account) -> None:
        """Let one account send as fast as it likes."""
        admin = self.register(f"admin-{secrets.token_hex(4)}", admin=True)
        path = f"/_synapse/admin/v1/users/{_quoted(account.user_id)}/override_ratelimit"
        self.call("POST", path, admin.token, {"messages_per_second": 0, "burst_count": 0})

    def messages(self, account: Account, room_id: str) -> list[dict[str, Any]]:
        """The room's last events, in the order said."""
        path = f"{CLIENT}/rooms/{_quoted(room_id)}/messages?dir=b&limit=500"
        return list(self.call("GET", path, account.token)["chunk"])[::-1]

    def members(self, account: Account, room_id: str) -> set[str]:
        path = f"{CLIENT}/rooms/{_quoted(room_id)}/joined_members"
        return set(self.call("GET", path, account.token)["joined"])

    def _config(self) -> dict[str, Any]:
        return {
            "server_name": "localhost",
            "pid_file": str(self.directory / "homeserver.pid"),
            "listeners": [
                {
                    "port": self.port,
                    "bind_addresses": ["127.0.0.1"],
                    "type": "http",
                    "resources": [{"names": ["client", "openid"]}],
                }
            ],
            "database": {
                "name": "sqlite3",
                "args": {"database": str(self.directory / "homeserver.db")},
            },
            "log_config": self._log_config(),
            "media_store_path": str(self.directory / "media"),
            "signing_key_path": str(self.directory / "signing.key"),
            "registration_shared_secret": self.secret,
            "macaroon_secret_key": secrets.token_hex(16),
            "form_secret": secrets.token_hex(16),
            "report_stats": False,
            "federation_domain_whitelist": [],
            "trusted_key_servers": [],
            "suppress_key_server_warning": True,
            "presence": {"enabled": False},
            "url_preview_enabled": False,
            "bcrypt_rounds": 4,
            # A restarted client would be given the answer that was made for its predecessor.
            "caches": {"sync_response_cache_duration": "0s"},
            **({} if self.default_limits else _no_limits()),
        }

    def _log_config(self) -> str:
        path = self.directory / "log.yaml"
        path.write_text(
            json.dumps(
                {
                    "version": 1,
                    "handlers": {"console": {"class": "logging.StreamHandler"}},
                    "root": {"level": "WARNING", "handlers": ["console"]},
                    "disable_existing_loggers": False,
                }
            )
        )
        return str(path)


def _no_limits() -> dict[str, Any]:
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


def wait_for(what: str, condition: Callable[[], T], seconds: float = 15) -> T:
    """The condition's first true value."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"Waited {seconds} s for {what}."
        time.sleep(0.03)
    return value


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _quoted(room_id: str) -> str:
    return urllib.parse.quote(room_id, safe="")
