import io
import json
import logging
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import structlog
from django.core.exceptions import ImproperlyConfigured

from config import logs
from config.scrub import Scrubber


def passes(levels: str, name: str, level: str) -> bool:
    record = logging.LogRecord(name, getattr(logging, level), "", 0, "", (), None)
    return logs.LevelFilter(logs.parse_levels(levels)).filter(record)


@pytest.mark.parametrize(
    ("levels", "name", "level", "passed"),
    [
        ("*=info", "agents.runs.execution", "INFO", True),
        ("*=info", "agents.runs.execution", "DEBUG", False),
        ("*=none,agents*=debug", "agents.runs.execution", "DEBUG", True),
        ("*=none,agents*=debug", "agents", "DEBUG", True),
        ("*=none,agents*=debug", "django.request", "ERROR", False),
        ("agents*=debug", "django.request", "INFO", True),
        ("*=warn", "chat", "INFO", False),
        ("*=WARN , chat = debug", "chat", "DEBUG", True),
        # Said on every request: shown only to who asks for it by name.
        ("*=info", "httpx2", "INFO", False),
        ("*=info,httpx2=info", "httpx2", "INFO", True),
        ("*=info", "celery.app.trace", "INFO", False),
        ("*=debug", "celery.app.trace", "WARNING", True),
    ],
)
def test_levels(levels: str, name: str, level: str, passed: bool) -> None:
    assert passes(levels, name, level) is passed


@pytest.mark.parametrize("levels", ["info", "*=", "=info", "*=loud", "*=info agents=debug"])
def test_what_makes_no_sense_is_refused_with_an_example(levels: str) -> None:
    with pytest.raises(ImproperlyConfigured, match=r"LOG_LEVELS.*Example"):
        logs.parse_levels(levels)


@pytest.fixture
def line() -> Iterator[Any]:
    """Log as the JSON configuration says; the line as it was written."""
    settings = dict(logs.configuration("*=info", "json")["formatters"]["structured"])
    written = io.StringIO()
    handler = logging.StreamHandler(written)
    handler.setFormatter(settings.pop("()")(**settings))
    logger = logging.getLogger("agents.runs.execution")
    logger.addHandler(handler)

    def log(write: Any) -> dict[str, Any]:
        write(logger)
        return dict(json.loads(written.getvalue()))

    yield log
    logger.removeHandler(handler)


def test_a_line_carries_the_ids_of_its_run(line: Any) -> None:
    with structlog.contextvars.bound_contextvars(run="run_1", thread="thr_1", correlation_id="c"):
        result = line(lambda logger: logger.info("Run %s", "completed"))

    assert result["message"] == "Run completed"
    assert (result["run"], result["thread"], result["correlation_id"]) == ("run_1", "thr_1", "c")
    assert (result["level"], result["logger"]) == ("info", "agents.runs.execution")
    assert result["timestamp"].endswith("Z")


def test_a_traceback_for_a_person_shows_no_local_variables() -> None:
    settings = dict(logs.configuration("*=info", "console")["formatters"]["structured"])
    formatter = settings.pop("()")(**settings)
    try:
        api_key = "sk-canary"
        raise RuntimeError(len(api_key))
    except RuntimeError:
        record = logging.getLogger("agents").makeRecord(
            "agents", logging.ERROR, "", 0, "It broke", (), sys.exc_info()
        )

    text = formatter.format(record)
    assert "RuntimeError" in text
    assert "sk-canary" not in text


def test_a_traceback_is_one_field_of_one_line(line: Any) -> None:
    def fail(logger: logging.Logger) -> None:
        try:
            raise RuntimeError("canary")
        except RuntimeError:
            logger.exception("It broke")

    assert "RuntimeError: canary" in line(fail)["exception"]


def test_a_webhooks_secret_is_taken_out() -> None:
    secret = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
    assert secret not in Scrubber()(f"It is {secret}.")
