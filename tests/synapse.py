"""A real homeserver for tests: Synapse on loopback, with SQLite, up in seconds.

    with Synapse(directory) as homeserver:
        alice = homeserver.register("alice")  # .user_id, .token, .device_id
        homeserver.call("POST", "/_matrix/client/v3/createRoom", alice.token, {})

It is started by SYNAPSE_PYTHON, or by the Python that runs the tests: wherever matrix-synapse is
installed.
"""

from __future__ import annotations

import functools
import os
import secrets
import signal
import subprocess
import sys
import time
import urllib.parse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

from scripts import homeserver
from tests.ports import free_port

START_SECONDS = 180
CLIENT = "/_matrix/client/v3"
T = TypeVar("T")


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
        self.keys = homeserver.new_keys()
        self.default_limits = default_limits
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        config = homeserver.configuration(self.directory, self.port, self.keys)
        if not self.default_limits:
            config |= homeserver.no_limits()
        homeserver.write(self.directory, config)
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
            self._process.wait(90)
            self._process = None

    def _healthy(self) -> bool:
        assert self._process is not None
        if self._process.poll() is not None:
            raise AssertionError((self.directory / "output.log").read_text()[-3000:])
        return homeserver.is_healthy(self.url)

    def register(self, name: str, password: str = "password", *, admin: bool = False) -> Account:
        secret = self.keys["registration_shared_secret"]
        answer = homeserver.register(self.url, secret, name, password, admin=admin)
        return Account(answer["user_id"], answer["access_token"], answer["device_id"], password)

    def call(
        self, method: str, path: str, token: str = "", body: Any = None, *, timeout: float = 60
    ) -> dict[str, Any]:
        """The answer of a call; raises `homeserver.CallFailed`."""
        return homeserver.call(self.url, method, path, token, body, timeout=timeout)

    def create_room(self, account: Account, invite: list[str] | None = None, **extra: Any) -> str:
        body = {"preset": "private_chat", "invite": invite or [], **extra}
        return str(self.call("POST", f"{CLIENT}/createRoom", account.token, body)["room_id"])

    def invite(self, account: Account, room_id: str, user_id: str) -> None:
        path = f"{CLIENT}/rooms/{_quoted(room_id)}/invite"
        self.call("POST", path, account.token, {"user_id": user_id})

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
        """Return the room's last events, in order."""
        path = f"{CLIENT}/rooms/{_quoted(room_id)}/messages?dir=b&limit=500"
        return list(self.call("GET", path, account.token)["chunk"])[::-1]

    def members(self, account: Account, room_id: str) -> set[str]:
        path = f"{CLIENT}/rooms/{_quoted(room_id)}/joined_members"
        return set(self.call("GET", path, account.token)["joined"])


def wait_for(what: str, condition: Callable[[], T], seconds: float = 60) -> T:
    """The condition's first true value."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"Waited {seconds} s for {what}."
        time.sleep(0.03)
    return value


def _quoted(room_id: str) -> str:
    return urllib.parse.quote(room_id, safe="")
