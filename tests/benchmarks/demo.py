"""Fill the database of a trial with a week of sample runs, rooms, failures and costs:
`python -m tests.benchmarks.demo [--runs 2000]`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from ops import commandline, local

PAGES = {
    "Home": "/admin/",
    "Failed runs": "/admin/agents/run/?status__exact=failed&period=7d",
    "Usage by user": "/admin/agents/usage/",
    "Prices": "/admin/agents/price/",
}


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    stack = local.adopt()
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "config.settings")
    with commandline.errors_in_a_sentence(is_running=stack is not None):
        _create(options)


def _create(options: argparse.Namespace) -> None:
    import django

    django.setup()
    from django.conf import settings

    from agents.models import Run
    from agents.usage import rollups
    from tests.benchmarks.sample import History

    if not settings.DEBUG:
        sys.exit("DEBUG is off: sample runs do not belong into production.")
    if not options.force and Run.objects.exists():
        sys.exit("This database contains runs. --force adds the sample runs to them.")
    count = History(runs=options.runs, days=options.days, failing=options.failing).write_all()
    while rollups.fold():
        pass
    print(f"Created {count} runs over {options.days} days.")
    _add_dead_letter()
    for title, path in PAGES.items():
        print(f"  {title}: http://localhost:{os.environ.get('PORT') or 3000}{path}")


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.demo", description=__doc__)
    parser.add_argument("--runs", type=int, default=2000)
    parser.add_argument("--days", type=int, default=7)
    parser.add_argument("--failing", type=float, default=0.04, help="share of failed runs, 0 to 1")
    parser.add_argument("--force", action="store_true", help="even if the database contains runs")
    return parser.parse_args(arguments)


def _add_dead_letter() -> None:
    import orjson
    from redis.exceptions import RedisError

    from agents.events import stream

    entry = stream.Entry("0-0", orjson.dumps({"type": "agent.run.requested", "payload": {}}))
    try:
        stream.dead_letter(entry, "'id' is missing")
    except RedisError:
        print("Redis is unavailable: no dead letter was created.")


if __name__ == "__main__":
    main()
