import asyncio
import logging
import signal
from typing import Any

from django.core.management.base import BaseCommand, CommandError

from botrunner.leader import Leader
from botrunner.matrix.errors import LoginRefused
from lib.secrets import Unreadable

logger = logging.getLogger(__name__)


class Command(BaseCommand):
    help = (
        "Run the bot in its Matrix rooms. Any number of processes may run: one leads, the others stand "
        "by."
    )
    # Other checks load the views, 30 MB that this process does not need.
    requires_system_checks = ["botrealm"]

    def handle(self, *args: Any, **options: Any) -> None:
        try:
            asyncio.run(self._run())
        except LoginRefused as error:
            raise CommandError(
                f"The homeserver refused BOT_RUNNER_USERNAME and BOT_RUNNER_PASSWORD ({error})."
            ) from None
        except Unreadable as error:
            raise CommandError(f"The bot runner cannot start: {error}") from None
        logger.info("Bot runner stopped")

    async def _run(self) -> None:
        stopping = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop, number, stopping)
        await Leader(stopping).run()

    def _stop(self, number: signal.Signals, stopping: asyncio.Event) -> None:
        """Stop after the current work; a second signal ends the process at once."""
        stopping.set()
        asyncio.get_running_loop().remove_signal_handler(number)
