from typing import Any

from django.core.management import BaseCommand, CommandError, CommandParser

from agents.usage import rollups


class Command(BaseCommand):
    help = "Rebuild the figures of the admin from the attempts in the database."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument(
            "--force", action="store_true", help="Rebuild even if figures of pruned runs are lost."
        )

    def handle(self, *args: Any, **options: Any) -> None:
        if not options["force"] and rollups.would_lose():
            raise CommandError(
                "The figures cover runs that have been pruned and would be lost. Use --force to "
                "rebuild anyway."
            )
        counted = rollups.rebuild()
        self.stdout.write(f"Counted {counted} attempts, cancellations and summaries.")
