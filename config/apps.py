from django.apps import AppConfig

from lib import files


class ConfigConfig(AppConfig):
    name = "config"

    def ready(self) -> None:
        from config import checks  # noqa: F401  (registers the system checks)

        # Web server, worker and bot: each holds a file for every connection, and common systems give
        # a process 1024 until it asks for more.
        files.raise_limit()
