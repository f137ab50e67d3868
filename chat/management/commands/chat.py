import os
import sys
from typing import Any

import httpx2
from django.core.management.base import BaseCommand, CommandError, CommandParser

from chat.terminal import SILENCE_SECONDS, RefusedByServer, TerminalChat
from lib import terminal


class Command(BaseCommand):
    help = "Chat with a running server in a terminal. Ctrl-C cancels an answer, Ctrl-D ends."
    requires_system_checks: list[str] = []  # they check the servers

    def add_arguments(self, parser: CommandParser) -> None:
        # PORT is that of the running local stack, if there is one.
        parser.add_argument("--url", default=f"http://localhost:{os.environ.get('PORT') or 3000}")
        parser.add_argument("--thread", help="continue this thread, or create one with this id")
        parser.add_argument("--model")
        parser.add_argument(
            "--token",
            default=os.environ.get("REALM_SERVER_JWT", ""),
            help="a realm-server JWT; default: REALM_SERVER_JWT",
        )

    def handle(self, *args: Any, **options: Any) -> None:
        with terminal.streams():
            self._chat(**options)

    def _chat(self, *, url: str, token: str, model: str, thread: str, **options: Any) -> None:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        with httpx2.Client(base_url=url, headers=headers, timeout=SILENCE_SECONDS) as client:
            conversation = TerminalChat(client, sys.stdout, model=model, thread_id=thread)
            try:
                while True:
                    if content := input("> " if sys.stdin.isatty() else "").strip():
                        conversation.send(content)
            except (EOFError, KeyboardInterrupt):
                if conversation.thread_id:
                    self.stderr.write(f"Thread {conversation.thread_id}")
            except RefusedByServer as error:
                raise CommandError(str(error)) from None
            except httpx2.HTTPError as error:
                raise CommandError(
                    f"{url} cannot be reached: {error} Start `make run`, or name a server by --url."
                ) from None
