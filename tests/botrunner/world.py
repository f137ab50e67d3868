"""A homeserver, a worker and a bot runner as real processes around the test's own database."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, Self

from django.conf import settings
from django.db import connection

from realm.models import BotCommand, BotRegistration, User
from tests import freezing
from tests.synapse import Account, Synapse, wait_for

BASE_DIR = Path(__file__).resolve().parents[2]
BOT = "@bot-runner:localhost"
MESSAGE = {"type": "matrix-event", "event_type": "m.room.message", "content_type": "m.text"}
# Among the initial state of a room.
ENCRYPTION = {
    "type": "m.room.encryption",
    "state_key": "",
    "content": {"algorithm": "m.megolm.v1.aes-sha2"},
}


class World:
    """`start` and `kill` name the processes `worker`, `bot`, `bot2`."""

    def __init__(self, synapse: Synapse, redis_url: str, directory: Path, bot: Account) -> None:
        self.synapse = synapse
        self.directory = directory
        self.bot = bot
        self.bot_id = bot.user_id
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.env = {
            **os.environ,
            "DJANGO_SETTINGS_MODULE": "config.settings",
            "DEBUG": "true",
            "LOG_FORMAT": "json",
            "DATABASE_URL": _database_url(),
            "REDIS_URL": redis_url,
            "MATRIX_URL": synapse.url,
            "BOT_RUNNER_USERNAME": bot.user_id[1:].partition(":")[0],
            "BOT_RUNNER_PASSWORD": bot.password,
            "BOT_RUNNER_STORE": str(directory / "store"),
            # Not so short that it lapses when the machine is busy.
            "BOT_RUNNER_LEASE_SECONDS": "5",
            "LOG_LEVELS": "*=info",
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        for name in list(self.processes):
            self.kill(name)

    def start(self, *names: str, **env: str) -> None:
        for name in names:
            command = (
                ["-m", "celery", "-A", "config", "worker", "-c", "4", "--without-mingle"]
                if name == "worker"
                else ["manage.py", "runbot"]
            )
            with (self.directory / f"{name}.log").open("ab") as log:
                self.processes[name] = subprocess.Popen(
                    [sys.executable, *command],
                    cwd=BASE_DIR,
                    env=self.env | env,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                )

    def kill(self, name: str, signum: int = signal.SIGKILL) -> int:
        process = self.processes.pop(name)
        process.send_signal(signum)
        return process.wait(60)

    def log(self, name: str = "bot") -> str:
        return (self.directory / f"{name}.log").read_text()

    def invite(self, account: Account, **extra: Any) -> str:
        """A room that the bot has joined."""
        room_id = self.synapse.create_room(account, [self.bot_id], **extra)
        self.wait_joined(account, room_id)
        return room_id

    def wait_joined(self, account: Account, room_id: str) -> None:
        self.wait("the bot to join", lambda: self.bot_id in self.synapse.members(account, room_id))

    def said_by_bot(self, account: Account, room_id: str) -> list[dict[str, Any]]:
        return [
            event
            for event in self.synapse.messages(account, room_id)
            if event["sender"] == self.bot_id and event["type"] == "m.room.message"
        ]

    def answers(self, account: Account, room_id: str, question: str) -> list[dict[str, Any]]:
        return [
            event["content"]
            for event in self.said_by_bot(account, room_id)
            if event["content"]["m.relates_to"]["m.in_reply_to"]["event_id"] == question
        ]

    def answer(self, account: Account, room_id: str, question: str) -> dict[str, Any]:
        """The one answer to a question."""
        found = self.wait("an answer", lambda: self.answers(account, room_id, question))
        assert len(found) == 1
        return found[0]

    def wait(self, what: str, condition: Any, seconds: float = 120) -> Any:
        try:
            return wait_for(what, lambda: self._all_alive() and condition(), seconds)
        except AssertionError as error:
            logs = "\n".join(p.read_text()[-4000:] for p in self.directory.glob("*.log"))
            raise AssertionError(f"{error}\n{logs}") from None

    def _all_alive(self) -> bool:
        for name, process in self.processes.items():
            assert process.poll() is None, f"The {name} has ended."
        return True


def register(account: Account, command: str = "chat.reply", **filter_: Any) -> BotCommand:
    """A bot command of the account's own registration."""
    user = User.objects.filter(matrix_user_id=account.user_id).first()
    user = user or User.objects.create_matrix_user(account.user_id)
    registration, _ = BotRegistration.objects.get_or_create(user=user, username=account.user_id)
    return BotCommand.objects.create(
        registration=registration, command=command, filter={**MESSAGE, **filter_}
    )


def freeze(pid: int) -> bool:
    """As `freezing.freeze`, with regard to the test's own database."""
    is_sqlite = connection.vendor == "sqlite"
    return freezing.freeze(pid, str(connection.settings_dict["NAME"]) if is_sqlite else "")


def _database_url() -> str:
    """That of the test's own database, for other processes."""
    name = connection.settings_dict["NAME"]
    if connection.vendor == "sqlite":
        return f"sqlite:///{name}"
    found = settings.DATABASES["default"]
    login = f"{found['USER']}:{found['PASSWORD']}@{found['HOST']}:{found['PORT']}"
    return f"postgres://{login}/{name}"
