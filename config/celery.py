import os
from typing import Any

from celery import Celery
from celery.fixups.django import DjangoFixup, DjangoWorkerFixup
from celery.signals import setup_logging
from django.conf import settings
from django.db import close_old_connections

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "config.settings")


class KeptConnections(DjangoWorkerFixup):
    """Between two tasks a connection is kept or closed as Django does it between two requests. Celery
    closes it before and after each task, and to open one to SQLite costs as much as three queries."""

    def close_database(self, **kwargs: Any) -> None:
        close_old_connections()


class Fixup(DjangoFixup):
    def on_worker_init(self, **kwargs: Any) -> None:
        self.worker_fixup = KeptConnections(self.app)
        super().on_worker_init(**kwargs)


def fixup(app: Celery) -> DjangoFixup:
    return Fixup(app).install()


class OwnSettings:
    """Those of Celery alone, by its own names: `celery inspect conf` and `celery report` show all that
    it was given, and would show REDIS_URL with its password."""

    def __dir__(self) -> list[str]:
        return [
            name.removeprefix("CELERY_").lower()
            for name in dir(settings)
            if name.startswith("CELERY_")
        ]

    def __getattr__(self, name: str) -> Any:
        return getattr(settings, f"CELERY_{name.upper()}")


app = Celery("botrealm", fixups={fixup})
app.config_from_object(OwnSettings())
app.autodiscover_tasks()
# By name: the module needs Django's apps, which are not loaded yet.
app.steps["worker"].add("agents.worker.bootstep:Runtime")


@setup_logging.connect
def keep_django_logging(**_: Any) -> None:
    """Receiving this signal is what stops Celery from replacing the logging set up by Django."""
