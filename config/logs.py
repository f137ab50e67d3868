"""Logging: `LOG_LEVELS`, and one structured line per record, for people or as JSON.

`LOG_LEVELS` is a comma-separated list of `pattern=level`; a pattern is a logger's name where `*`
matches anything. The last matching pattern decides: `*=none,agents*=debug`.
"""

import fnmatch
import functools
import logging
import sys
from collections.abc import Callable, Iterator
from typing import Any

import structlog
from django.core.exceptions import ImproperlyConfigured, SuspiciousOperation

from config.scrub import FIELD, LINE, cleaned, is_private

LEVELS = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warn": logging.WARNING,
    "warning": logging.WARNING,
    "error": logging.ERROR,
    "critical": logging.CRITICAL,
    "none": logging.CRITICAL + 1,
}
# Lines of libraries for every task, request or attempt; a pattern with the name turns them on.
QUIET = {
    "celery.worker.strategy": logging.WARNING,
    "celery.app.trace": logging.WARNING,
    "celery.utils.functional": logging.WARNING,
    "httpx": logging.WARNING,
    "httpx2": logging.WARNING,
    "httpcore": logging.WARNING,
    "openai": logging.WARNING,
    "asyncio": logging.WARNING,
    "axes": logging.WARNING,
    "kombu": logging.WARNING,
    "amqp": logging.WARNING,
    "nio": logging.WARNING,
    "psycopg.pool": logging.ERROR,  # the code that needs the connection logs its error
}


PLAIN = frozenset({str, int, float, bool, type(None)})


def _with_subclasses(kind: type[Exception]) -> Iterator[type[Exception]]:
    yield kind
    for each in kind.__subclasses__():
        yield from _with_subclasses(each)


def parse_levels(value: str) -> list[tuple[str, int]]:
    rules = []
    for part in filter(None, (part.strip() for part in value.split(","))):
        pattern, equals, level = (piece.strip() for piece in part.partition("="))
        if not equals or not pattern or level.lower() not in LEVELS:
            raise ImproperlyConfigured(
                "LOG_LEVELS has an entry that is not pattern=level; levels are "
                f"{', '.join(LEVELS)}. Example: *=info,agents*=debug"
            )
        rules.append((pattern, LEVELS[level.lower()]))
    return rules


class LevelFilter(logging.Filter):
    """Passes a record when the last matching rule allows its level."""

    def __init__(self, rules: list[tuple[str, int]]) -> None:
        super().__init__()
        self.rules = rules
        self.threshold = functools.cache(self._threshold)

    def _threshold(self, name: str) -> int:
        threshold = logging.INFO
        for pattern, level in self.rules:
            if fnmatch.fnmatchcase(name, pattern):
                threshold = level
                if pattern == "*":
                    parent = next(
                        (quiet for quiet in QUIET if f"{name}.".startswith(f"{quiet}.")), ""
                    )
                    threshold = max(level, QUIET.get(parent, level))
        return threshold

    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno >= self.threshold(record.name)


class OnlyDefects(logging.Filter):
    """Passes Django's records of defects only: `ops.middleware` logs each request."""

    def filter(self, record: logging.LogRecord) -> bool:
        return bool(record.exc_info) and getattr(record, "status_code", 500) >= 500


# Below `django.security`: the exceptions for refused requests, and the CSRF check.
REFUSED = "Request refused: %s"
REFUSALS = (
    "csrf",
    # Not importable before the apps are ready.
    "DisallowedModelAdminLookup",
    "DisallowedModelAdminToField",
    *(kind.__name__ for kind in _with_subclasses(SuspiciousOperation)),
)


class ShortRefusals(logging.Filter):
    """Shortens Django's record of a refused request (forbidden host, failed CSRF check, forbidden
    filter of the admin) to one warning. Django's own quotes headers and has a useless traceback."""

    def filter(self, record: logging.LogRecord) -> bool:
        if record.name.startswith("django.security.") and record.msg != REFUSED:
            kind = record.name.rpartition(".")[2]
            if kind == "csrf" and isinstance(record.args, tuple) and record.args:
                # "Origin checking failed - https://... does not match ..."
                kind = f"{kind}: {str(record.args[0]).partition(' - ')[0]}"
            record.msg, record.args = REFUSED, (kind[:100],)
            record.exc_info = record.exc_text = None
            record.levelno, record.levelname = logging.WARNING, "WARNING"
        return True


class Cleaner:
    """Scrubs the values of a record, and cuts long ones."""

    def __init__(self, scrub: Callable[[str], str]) -> None:
        self.scrub = scrub

    def __call__(self, logger: Any, method: str, event: Any) -> Any:
        texts = [value for value in event.values() if type(value) is str]
        size = sum(map(len, texts))
        if size <= FIELD and self._is_plain(event):
            # The usual case: scrubbed as one text.
            whole = "\n".join(texts)
            if self.scrub(whole) == whole:
                return event
        return cleaned(event, self.scrub, FIELD if size <= LINE else LINE // max(2, len(texts)))

    def _is_plain(self, event: Any) -> bool:
        return all(
            type(value) in PLAIN and not (value and is_private(name))
            for name, value in event.items()
        )


def configuration(levels: str, style: str, *, scrub: Callable[[str], str] = str) -> dict[str, Any]:
    """Return Django's LOGGING for a value of `LOG_LEVELS` and a style, `console` or `json`. All values
    of a record pass `scrub`."""
    rules = parse_levels(levels)
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.add_log_level,
        structlog.stdlib.PositionalArgumentsFormatter(),
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    if style == "json":
        renderers: list[Any] = [
            structlog.processors.EventRenamer("message"),
            structlog.processors.JSONRenderer(),
        ]
    else:
        renderers = [
            structlog.dev.ConsoleRenderer(
                colors=sys.stderr.isatty(),
                pad_event_to=32,
                # The default prints local variables, with prompts and keys.
                exception_formatter=structlog.dev.plain_traceback,
            )
        ]
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "filters": {
            "levels": {"()": LevelFilter, "rules": rules},
            "only_defects": {"()": OnlyDefects},
            "short_refusals": {"()": ShortRefusals},
        },
        "formatters": {
            "structured": {
                "()": structlog.stdlib.ProcessorFormatter,
                "processors": [
                    structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                    structlog.processors.format_exc_info,
                    Cleaner(scrub),
                    *renderers,
                ],
                "foreign_pre_chain": shared,
            }
        },
        "handlers": {
            "stderr": {
                "class": "logging.StreamHandler",
                "filters": ["short_refusals", "levels"],
                "formatter": "structured",
            }
        },
        "root": {
            "handlers": ["stderr"],
            "level": min([level for _, level in rules], default=logging.INFO),
        },
        # Django attaches handlers of its own to these two.
        "loggers": {
            "django": {"handlers": [], "propagate": True},
            "django.server": {"handlers": [], "propagate": True},
            "django.request": {"filters": ["only_defects"], "propagate": True},
            # One by one: error reports read a record before any handler.
            **{
                f"django.security.{name}": {"filters": ["short_refusals"], "propagate": True}
                for name in REFUSALS
            },
        },
    }
