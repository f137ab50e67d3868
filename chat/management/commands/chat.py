import os
import sys
from typing import Any

import httpx2
from django.core.management.base import BaseCommand, CommandError, CommandParser

from chat import terminal


class Command(BaseCommand):
    help = "Talk with a running server. Ctrl-C cancels an answer, Ctrl-D ends."
    requires_system_checks: list[str] = []  # they are about the servers

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--url", default=f"http://localhost:{os.environ.get('PORT') or 3000}")
        parser.add_argument("--thread", help="go on in this thread, or begin one of this name")
        parser.add_argument("--model")
        parser.add_argument(
            "--token",
            default=os.environ.get("REALM_SERVER_JWT", ""),
            help="a realm-server JWT; default: REALM_SERVER_JWT",
        )

    def handle(self, *args: Any, **options: Any) -> None:
        headers = {"Authorization": f"Bearer {options['token']}"} if options["token"] else {}
        with httpx2.Client(
            base_url=options["url"], headers=headers, timeout=terminal.SILENCE_SECONDS
        ) as client:
            talk = terminal.Conversation(
                client, sys.stdout, model=options["model"], thread_id=options["thread"]
            )
            try:
                while True:
                    content = input("> " if sys.stdin.isatty() else "").strip()
                    if content:
                        talk.ask(content)
            except (EOFError, KeyboardInterrupt):
                self.stderr.write(f"Thread {talk.thread_id}" if talk.thread_id else "")
            except terminal.Refused as error:
                raise CommandError(str(error)) from None
            except httpx2.HTTPError as error:
                raise CommandError(f"{options['url']} cannot be reached: {error}") from None
