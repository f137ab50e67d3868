from django.apps import AppConfig

from lib import files


class ConfigConfig(AppConfig):
    name = "config"

    def ready(self) -> None:
        from config import checks  # noqa: F401  (registers the system checks)

        # Web server, worker and bot hold a file for every connection, and the usual soft limit is 1024.
        files.raise_limit()
