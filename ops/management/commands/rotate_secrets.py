import json
from dataclasses import asdict
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser

from ops import secrets_at_rest


class Command(BaseCommand):
    help = (
        "Encrypt all stored secrets under the first key of SECRETS_KEY. It may run beside all "
        "processes that have the key, and be ended and begun again. Run it on a host with "
        "BOT_RUNNER_STORE, which has one of them."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--dry-run", action="store_true", help="change nothing, only count")
        parser.add_argument("--json", action="store_true", help="for machines")

    def handle(self, *args: Any, dry_run: bool, **options: Any) -> None:
        found = secrets_at_rest.count() if dry_run else secrets_at_rest.rotate()
        if options["json"]:
            self.stdout.write(json.dumps(asdict(found)))
        else:
            self.stdout.write(
                f"{found.total} secrets; {found.outdated} were not encrypted under the newest key, "
                f"{found.rotated} are now; {found.unreadable} cannot be read."
            )
        if found.unreadable:
            raise CommandError(
                f"{found.unreadable} secrets cannot be decrypted by SECRETS_KEY and stay as they are. "
                "Put the key that they were encrypted under at the end of the list."
            )
