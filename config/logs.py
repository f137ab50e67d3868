"""Logging: `LOG_LEVELS`, and one structured line per record, for a person or for a machine.

`LOG_LEVELS` is a comma-separated list of `pattern=level`; a pattern is a logger's name where `*`
stands for anything. The last pattern that matches decides: `*=none,agents*=debug`.
"""

import fnmatch
import functools
import logging
import sys
from collections.abc import Callable
from typing import Any

import structlog
from django.core.exceptions import ImproperlyConfigured

LEVELS = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warn": logging.WARNING,
    "warning": logging.WARNING,
    "error": logging.ERROR,
    "critical": logging.CRITICAL,
    "none": logging.CRITICAL + 1,
}
# What libraries say on every task, request or attempt is noise unless it is asked for by name.
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
    "psycopg.pool": logging.ERROR,  # whoever needs the connection says that it is missing
}


def parse_levels(value: str) -> list[tuple[str, int]]:
    rules = []
    for part in filter(None, (part.strip() for part in value.split(","))):
        pattern, equals, level = (piece.strip() for piece in part.partition("="))
        if not equals or not pattern or level.lower() not in LEVELS:
            raise ImproperlyConfigured(
                f"LOG_LEVELS={value!r}: {part!r} is not pattern=level; levels are "
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
                    top = next((quiet for quiet in QUIET if f"{name}.".startswith(f"{quiet}.")), "")
                    threshold = max(level, QUIET.get(top, level))
        return threshold

    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno >= self.threshold(record.name)


class OnlyWithTraceback(logging.Filter):
    """Of what Django says of a request, the defects: how it was answered stands in our own line."""

    def filter(self, record: logging.LogRecord) -> bool:
        return bool(record.exc_info)


def configuration(levels: str, style: str, *, scrub: Callable[[str], str] = str) -> dict[str, Any]:
    """Django's LOGGING for a value of `LOG_LEVELS` and a style, `console` or `json`. Each line goes
    through `scrub`."""
    rules = parse_levels(levels)
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.add_log_level,
        structlog.stdlib.PositionalArgumentsFormatter(),
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    if style == "json":
        last: list[Any] = [
            structlog.processors.format_exc_info,
            structlog.processors.EventRenamer("message"),
            structlog.processors.JSONRenderer(),
        ]
    else:
        last = [
            structlog.dev.ConsoleRenderer(
                colors=sys.stderr.isatty(),
                pad_event_to=32,
                # The default prints local variables where it can: prompts and keys.
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
            "only_with_traceback": {"()": OnlyWithTraceback},
        },
        "formatters": {
            "structured": {
                "()": structlog.stdlib.ProcessorFormatter,
                "processors": [
                    structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                    *last,
                    lambda logger, method, line: scrub(line),
                ],
                "foreign_pre_chain": shared,
            }
        },
        "handlers": {
            "stderr": {
                "class": "logging.StreamHandler",
                "filters": ["levels"],
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
            "django.request": {"filters": ["only_with_traceback"], "propagate": True},
        },
    }
