"""What a bot command may fire."""

COMMANDS = ("chat.reply", "chat.summarize", "ping")


class UnknownCommand(Exception):
    """There is no such command; the message lists the known ones and is safe to show."""


def known() -> list[str]:
    return sorted(COMMANDS)


def check(command: str) -> None:
    """Raises `UnknownCommand`."""
    if command not in COMMANDS:
        raise UnknownCommand(
            f"There is no command {command[:200]!r}. Known commands: {', '.join(known())}."
        )
