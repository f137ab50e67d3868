import io
import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import sentry_sdk
from django.conf import settings as configured
from sentry_sdk.envelope import Envelope
from sentry_sdk.transport import Transport

from config import errors, logs


class Lines:
    """What is logged, as a machine gets it."""

    def __init__(self) -> None:
        self.stream = io.StringIO()

    @property
    def text(self) -> str:
        return self.stream.getvalue()

    def of(self, message: str) -> list[dict[str, Any]]:
        told = [json.loads(line) for line in self.text.splitlines()]
        return [line for line in told if line["message"] == message]

    def one(self, message: str) -> dict[str, Any]:
        [line] = self.of(message)
        return line


@pytest.fixture
def lines() -> Iterator[Lines]:
    configuration = logs.configuration("*=info", "json", scrub=configured.SCRUBBER)
    formatter = dict(configuration["formatters"]["structured"])
    levels = dict(configuration["filters"]["levels"])
    found = Lines()
    handler = logging.StreamHandler(found.stream)
    handler.setFormatter(formatter.pop("()")(**formatter))
    handler.addFilter(levels.pop("()")(**levels))
    logging.getLogger().addHandler(handler)
    yield found
    logging.getLogger().removeHandler(handler)


class Mailbox(Transport):
    """Keeps what would go to Sentry."""

    def __init__(self) -> None:
        super().__init__({"dsn": "https://key@sentry.invalid/1"})
        self.envelopes: list[Envelope] = []

    def capture_envelope(self, envelope: Envelope) -> None:
        self.envelopes.append(envelope)

    @property
    def events(self) -> list[dict[str, Any]]:
        found = [envelope.get_event() for envelope in self.envelopes]
        return [dict(event) for event in found if event]

    @property
    def text(self) -> str:
        return "\n".join(
            envelope.serialize().decode(errors="replace") for envelope in self.envelopes
        )


@pytest.fixture
def sentry() -> Iterator[Mailbox]:
    """Reports as in production, but for where they go."""
    mailbox = Mailbox()
    errors.report_to(
        "https://key@sentry.invalid/1",
        environment="tests",
        release="botrealm@1.2.3",
        scrub=configured.SCRUBBER,
        transport=mailbox,
    )
    yield mailbox
    sentry_sdk.get_client().close(timeout=0)
    sentry_sdk.get_global_scope().set_client(None)
