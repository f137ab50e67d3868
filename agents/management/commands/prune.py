import json
from typing import Any

from django.core.management.base import BaseCommand, CommandParser

from agents import retention


class Command(BaseCommand):
    help = (
        "Delete what is older than the RETENTION_* settings keep it. The workers do so by themselves, "
        "a little at a time; this does all of it now, beside them."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--dry-run", action="store_true", help="Count, and delete nothing.")
        parser.add_argument("--json", action="store_true", help="Print the counts as JSON.")

    def handle(self, *args: Any, **options: Any) -> None:
        dry = options["dry_run"]
        found = retention.everything_due() if dry else retention.prune_everything()
        if options["json"]:
            self.stdout.write(json.dumps(found))
            return
        for name, count in found.items():
            self.stdout.write(f"{name}: {count} {'to delete' if dry else 'deleted'}")
        if not any(found.values()):
            self.stdout.write("Nothing is too old.")
