import contextlib
import json
import os
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

import httpx2
from django.conf import settings
from django.core.management.base import BaseCommand, CommandError, CommandParser

from botrunner.matrix.events import REPLY_FIELD
from lib.terminal import printable

CLIENT = "/_matrix/client/v3"
CALL_SECONDS = 30
JOIN_SECONDS = 20
POLL_SECONDS = 0.2
COMMAND = "chat.reply"
FILTER = {"type": "matrix-event", "event_type": "m.room.message", "content_type": "m.text"}
T = TypeVar("T")


class Command(BaseCommand):
    help = (
        "Act as a user: register a bot command, invite the bot to a room and send a message. By "
        "default with the homeserver and the demo account of the running local stack."
    )
    requires_system_checks: list[str] = []  # they concern the servers

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--user", help="Matrix account of the user")
        parser.add_argument("--password")
        parser.add_argument("--matrix-url", help="the homeserver")
        parser.add_argument("--realm-url", help="the realm server")
        parser.add_argument("--bot", help="Matrix account of the bot runner")
        parser.add_argument(
            "--message", default="Summarize current state", help="the message to send"
        )
        parser.add_argument(
            "--seconds", type=float, default=120, help="how long to wait for the answer"
        )

    def handle(self, *args: Any, message: str, seconds: float, **options: Any) -> None:
        given = stack_options() | {name: options[name] for name in options if options[name]}
        if not given.get("user") or not given.get("password"):
            raise CommandError(
                "No demo account found: start the local stack (make run), or set --user and --password."
            )
        matrix = Service("The homeserver", given.get("matrix_url") or settings.MATRIX_URL)
        realm = Service("The realm server", given.get("realm_url") or default_realm_url())
        bot = given.get("bot") or settings.BOT_RUNNER_USERNAME
        with matrix.client, realm.client:
            person = Person(matrix, realm, self._write)
            person.log_in(given["user"], given["password"])
            try:
                person.get_realm_token()
                person.add_command(person.register())
                room_id = person.invite(bot if bot.startswith("@") else f"@{bot}:{person.server}")
                answer = person.ask(room_id, message, seconds)
            finally:
                person.log_out()
        self._write(f"\n{answer}")

    def execute(self, *args: Any, **options: Any) -> str | None:
        try:
            return super().execute(*args, **options)
        except CommandError as error:
            raise CommandError(printable(str(error))) from None

    def _write(self, text: str) -> None:
        self.stdout.write(printable(text))


def default_realm_url() -> str:
    return f"http://localhost:{os.environ.get('REALM_SERVER_PORT', '').strip() or 4201}"


def stack_options() -> dict[str, str]:
    """Read the options that the local stack has stored; the environment overrides them."""
    folder = Path(settings.BASE_DIR / (os.environ.get("STACK_DIR", "").strip() or ".local"))
    try:
        options = json.loads((folder / "demo.json").read_text())
    except FileNotFoundError:
        options = {}
    for name, variable in (("matrix_url", "MATRIX_URL"), ("realm_url", "REALM_SERVER_URL")):
        if value := os.environ.get(variable, "").strip():
            options[name] = value
    return dict(options)


class Service:
    """An HTTP client of one server; raises `CommandError` on every error."""

    def __init__(self, name: str, url: str) -> None:
        self.name = name
        # The stack is on this machine: ignore proxies of the environment.
        self.client = httpx2.Client(base_url=url.rstrip("/"), timeout=CALL_SECONDS, trust_env=False)

    def call(self, method: str, path: str, body: Any = None, *, jsonapi: bool = False) -> Any:
        kind = "application/vnd.api+json" if jsonapi else "application/json"
        content = None if body is None else json.dumps(body)
        try:
            answer = self.client.request(
                method, path, content=content, headers={"Content-Type": kind, "Accept": kind}
            )
            document = answer.json()
        except httpx2.HTTPError as error:
            raise CommandError(
                f"{self.name} at {self.client.base_url}: {error}. Does it run? Start the local stack "
                "(make run), or name another by --matrix-url and --realm-url."
            ) from None
        except ValueError:
            document = answer.text[:200]
        if answer.is_error:
            where = f"{method} {path.partition('?')[0]}"
            raise CommandError(f"{self.name} returned {answer.status_code} to {where}: {document}")
        return document

    def sign_in(self, token: str) -> None:
        self.client.headers["Authorization"] = f"Bearer {token}"


class Person:
    """A user with a Matrix client. Each step prints its result."""

    def __init__(self, matrix: Service, realm: Service, write: Callable[[str], Any]) -> None:
        self.matrix = matrix
        self.realm = realm
        self.write = write
        self.user_id = ""

    @property
    def server(self) -> str:
        return self.user_id.partition(":")[2]

    def log_in(self, user: str, password: str) -> None:
        login = {
            "type": "m.login.password",
            "identifier": {"type": "m.id.user", "user": user},
            "password": password,
            "initial_device_display_name": "matrix_demo",
        }
        answer = self.matrix.call("POST", f"{CLIENT}/login", login)
        self.user_id = answer["user_id"]
        self.matrix.sign_in(answer["access_token"])
        self.write(f"Logged in at {self.matrix.client.base_url} as {self.user_id}")

    def log_out(self) -> None:
        """Log out, so that no device remains. Errors here must not hide earlier ones."""
        with contextlib.suppress(CommandError):
            self.matrix.call("POST", f"{CLIENT}/logout", {})

    def get_realm_token(self) -> None:
        path = f"{CLIENT}/user/{quote(self.user_id)}/openid/request_token"
        openid = self.matrix.call("POST", path, {})
        session = self.realm.call("POST", "/_server-session", openid)
        self.realm.sign_in(session["data"]["attributes"]["token"])
        self.write(f"Got a JWT of the realm server at {self.realm.client.base_url} for it")

    def register(self) -> str:
        """Return the id of the user's registration, created if missing."""
        existing = self.realm.call("GET", "/_bot-registrations", jsonapi=True)["data"]
        if existing:
            self.write(f"Found the bot registration {existing[0]['id']}")
            return str(existing[0]["id"])
        resource = {"type": "bot-registration", "attributes": {"username": self.user_id}}
        made = self.realm.call("POST", "/_bot-registration", {"data": resource}, jsonapi=True)
        self.write(f"Registered a bot: {made['data']['id']}")
        return str(made["data"]["id"])

    def add_command(self, bot_id: str) -> None:
        """Register a command for text messages, unless it exists."""
        commands = self.realm.call("GET", f"/_bot-commands?botId={bot_id}", jsonapi=True)["data"]
        if any(command["attributes"]["filter"] == FILTER for command in commands):
            self.write("Found its command for text messages")
            return
        attributes = {"botId": bot_id, "command": COMMAND, "filter": FILTER}
        document = {"data": {"type": "bot-command", "attributes": attributes}}
        self.realm.call("POST", "/_bot-commands", document, jsonapi=True)
        self.write(f"Registered the command {COMMAND} for text messages")

    def invite(self, bot: str) -> str:
        """Create a room, wait until the bot has joined, and return its id."""
        room = {"preset": "private_chat", "name": "Demo", "invite": [bot]}
        room_id = str(self.matrix.call("POST", f"{CLIENT}/createRoom", room)["room_id"])
        self.write(f"Created the room {room_id} and invited {bot}")
        path = f"{CLIENT}/rooms/{quote(room_id)}/joined_members"
        wait_for(
            lambda: bot in self.matrix.call("GET", path)["joined"],
            JOIN_SECONDS,
            f"{bot} did not join within {JOIN_SECONDS} s: is runbot running?",
        )
        self.write(f"{bot} joined")
        return room_id

    def ask(self, room_id: str, message: str, seconds: float) -> str:
        """Send a message and return the answer. Raises `CommandError` if it is refused."""
        path = f"{CLIENT}/rooms/{quote(room_id)}"
        sent = self.matrix.call(
            "PUT",
            f"{path}/send/m.room.message/{secrets.token_hex(8)}",
            {"msgtype": "m.text", "body": message},
        )
        self.write(f"Sent: {message}")
        answer = wait_for(
            lambda: answer_to(
                sent["event_id"], self.matrix.call("GET", f"{path}/messages?dir=b&limit=20")
            ),
            seconds,
            f"No answer within {seconds:g} s: does a worker run?",
        )
        if answer["msgtype"] == "m.notice":
            raise CommandError(answer["body"])
        return str(answer["body"])


def answer_to(event_id: str, page: dict[str, Any]) -> dict[str, Any] | None:
    for event in page["chunk"]:
        replied = event["content"].get("m.relates_to", {}).get("m.in_reply_to", {})
        if replied.get("event_id") == event_id:
            relations = event.get("unsigned", {}).get("m.relations", {})
            edit = relations.get("m.replace", {}).get("content", {})
            content = dict(edit.get("m.new_content") or event["content"])
            return None if content.get(REPLY_FIELD, {}).get("draft") else content
    return None


def wait_for(look: Callable[[], T | None], seconds: float, problem: str) -> T:
    """Repeat `look` until it returns a value. Raises `CommandError` on timeout."""
    deadline = time.monotonic() + seconds
    while not (result := look()):
        if time.monotonic() > deadline:
            raise CommandError(problem)
        time.sleep(POLL_SECONDS)
    return result
