from typing import Any

import orjson
from django.conf import settings
from django.core.management import BaseCommand, CommandError, CommandParser
from redis.exceptions import RedisError

from agents.events import stream
from agents.models import Run
from agents.usage import rollups
from console.demo import FAILING, History


class Command(BaseCommand):
    help = "Fills the database of a trial with a week of made-up runs, rooms, failures and costs."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--runs", type=int, default=2000)
        parser.add_argument("--days", type=int, default=7)
        parser.add_argument(
            "--failing", type=float, default=FAILING, help="share of the runs that fail: 0 to 1"
        )
        parser.add_argument(
            "--force", action="store_true", help="although there are runs in the database already"
        )

    def handle(self, *args: Any, **options: Any) -> None:
        if not settings.DEBUG:
            raise CommandError("DEBUG is off: made-up runs do not belong into production.")
        if not options["force"] and Run.objects.exists():
            raise CommandError(
                "There are runs in this database. --force puts the made-up ones among them."
            )
        history = History(runs=options["runs"], days=options["days"], failing=options["failing"])
        made = history.tell()
        while rollups.fold():
            pass
        self.stdout.write(f"Made {made} runs over {options['days']} days.")
        self._bury()
        for title, path in (
            ("Home", "/admin/"),
            ("What failed", "/admin/agents/run/?status__exact=failed&period=7d"),
            ("Who used what", "/admin/agents/usage/"),
            ("Prices", "/admin/agents/price/"),
        ):
            self.stdout.write(f"  {title}: {path}")

    def _bury(self) -> None:
        """A dead letter, for somebody to look at."""
        entry = stream.Entry("0-0", orjson.dumps({"type": "agent.run.requested", "payload": {}}))
        try:
            stream.dead_letter(entry, "'id' is missing")
        except RedisError:
            self.stdout.write("Redis is away: there is no dead letter to be seen.")
