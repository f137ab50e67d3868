from importlib import import_module
from typing import Any

from django.apps import AppConfig
from django.conf import settings
from django.db.models.signals import pre_delete
from django.utils.module_loading import autodiscover_modules


class AgentsConfig(AppConfig):
    name = "agents"

    def ready(self) -> None:
        from agents import deletions

        deletions.connect()
        import_module("agents.runs.commands")
        # The commands.py of an app registers its commands.
        autodiscover_modules("commands")
        pre_delete.connect(_delete_threads, sender=settings.AUTH_USER_MODEL)


def _delete_threads(instance: Any, **_: Any) -> None:
    from agents import retention  # models cannot be imported before the apps are ready

    retention.delete_threads_of(instance)
