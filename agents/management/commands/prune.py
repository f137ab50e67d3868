import json
from typing import Any

from django.core.management.base import BaseCommand, CommandParser

from agents import retention


class Command(BaseCommand):
    help = (
        "Delete rows past their retention (RETENTION_*). The workers do this gradually; this command "
        "deletes all of them now, and may run beside the workers."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--dry-run", action="store_true", help="Count only.")
        parser.add_argument("--json", action="store_true", help="Print the counts as JSON.")

    def handle(self, *args: Any, **options: Any) -> None:
        dry = options["dry_run"]
        counts = retention.everything_due() if dry else retention.prune_everything()
        if options["json"]:
            self.stdout.write(json.dumps(counts))
            return
        for name, count in counts.items():
            self.stdout.write(f"{name}: {count} {'to delete' if dry else 'deleted'}")
        if not any(counts.values()):
            self.stdout.write("Nothing to delete.")
