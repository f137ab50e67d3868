import os
import sys
from pathlib import Path
from typing import Any

from celery import Celery
from celery.fixups.django import DjangoFixup, DjangoWorkerFixup
from celery.signals import setup_logging
from django.conf import settings
from django.db import close_old_connections

from config import misspelt
from ops import local

# Celery's own command, such as `celery -A config inspect ping`; others choose their settings earlier.
if "celery" in Path(sys.argv[0]).parts[-2:] and not local.adopt() and not local.names_redis():
    sys.stderr.write("No local stack runs, and REDIS_URL is not set. Start one: make run\n")
os.environ.setdefault("DJANGO_SETTINGS_MODULE", "config.settings")


class PersistentConnectionsFixup(DjangoWorkerFixup):
    """Keeps or closes connections between tasks as Django does between requests. Celery closes them
    before and after each task, and to open one to SQLite costs as much as three queries.

    It can go when Celery respects CONN_MAX_AGE: celery/celery#6134 did, #9824 reverted it, and 5.7
    does not.
    """

    def close_database(self, **kwargs: Any) -> None:
        close_old_connections()


class Fixup(DjangoFixup):
    def on_worker_init(self, **kwargs: Any) -> None:
        self.worker_fixup = PersistentConnectionsFixup(self.app)
        super().on_worker_init(**kwargs)
        misspelt.log()


def fixup(app: Celery) -> DjangoFixup:
    return Fixup(app).install()


class CelerySettings:
    """The settings of Celery by its own names. `celery inspect conf` and `celery report` show all that
    it receives, and would show REDIS_URL with its password."""

    def __dir__(self) -> list[str]:
        return [
            name.removeprefix("CELERY_").lower()
            for name in dir(settings)
            if name.startswith("CELERY_")
        ]

    def __getattr__(self, name: str) -> Any:
        return getattr(settings, f"CELERY_{name.upper()}")


app = Celery("botrealm", fixups={fixup})
app.config_from_object(CelerySettings())
app.autodiscover_tasks()
# By name: the module needs Django's apps, which are not loaded yet.
app.steps["worker"].add("agents.worker.bootstep:Runtime")


@setup_logging.connect
def keep_django_logging(**_: Any) -> None:
    """Keep the logging of Django: Celery replaces it unless this signal has a receiver."""
