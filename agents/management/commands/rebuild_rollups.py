from typing import Any

from django.core.management import BaseCommand, CommandError, CommandParser

from agents.usage import rollups


class Command(BaseCommand):
    help = "Adds all figures of the admin up again, from the attempts that are kept."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument(
            "--force", action="store_true", help="also where runs of long ago are no longer kept"
        )

    def handle(self, *args: Any, **options: Any) -> None:
        if not options["force"] and rollups.would_lose():
            raise CommandError(
                "The figures reach further back than the runs that are kept: what was pruned would "
                "be lost from them. --force does it all the same."
            )
        counted = rollups.rebuild()
        self.stdout.write(f"Counted {counted} attempts, cancellations and summaries.")
