import json
from dataclasses import asdict
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser

from ops import secrets_at_rest


class Command(BaseCommand):
    help = (
        "Encrypt all stored secrets with the first key of SECRETS_KEY. It may run beside all "
        "processes that have the key, and may be interrupted and repeated. Run it on a host with "
        "BOT_RUNNER_STORE, which holds one of them."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--dry-run", action="store_true", help="Count only.")
        parser.add_argument("--json", action="store_true", help="Print JSON.")

    def handle(self, *args: Any, dry_run: bool, **options: Any) -> None:
        counts = secrets_at_rest.count() if dry_run else secrets_at_rest.rotate()
        if options["json"]:
            self.stdout.write(json.dumps(asdict(counts)))
        else:
            self.stdout.write(
                f"{counts.total} secrets; {counts.outdated} were not encrypted with the newest key, "
                f"{counts.rotated} re-encrypted, {counts.unreadable} unreadable."
            )
        if counts.unreadable:
            raise CommandError(
                f"{counts.unreadable} secrets cannot be decrypted with SECRETS_KEY and stay unchanged. "
                "Add the key that they were encrypted with to the end of the list."
            )
