from django.apps import AppConfig
from django.utils.module_loading import autodiscover_modules


class AgentsConfig(AppConfig):
    name = "agents"

    def ready(self) -> None:
        from agents import deletions

        deletions.connect()
        # What the commands.py of each app adds to the table of agents.commands.
        autodiscover_modules("commands")
