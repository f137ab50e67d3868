import os
from typing import Any

from celery import Celery
from celery.signals import setup_logging

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "config.settings")

app = Celery("botrealm")
app.config_from_object("django.conf:settings", namespace="CELERY")
app.autodiscover_tasks()
# By name: the module needs Django's apps, which are not loaded yet.
app.steps["worker"].add("agents.runtime:Runtime")


@setup_logging.connect
def keep_django_logging(**_: Any) -> None:
    """Receiving this signal is what stops Celery from replacing the logging set up by Django."""
