"""What Django refuses a request for stands in the log as one short line."""

import io
import json
import logging
import logging.config
from collections.abc import Iterator
from typing import Any

import pytest
from django.test import Client

from config import logs

pytestmark = pytest.mark.django_db
LONG = "canary" * 9_000


@pytest.fixture
def written() -> Iterator[io.StringIO]:
    """What the configuration writes."""
    configuration = logs.configuration("*=info", "json")
    handler = configuration["handlers"]["stderr"]
    text = io.StringIO()
    handler["stream"] = text
    before = {name: logging.getLogger(name).filters[:] for name in configuration["loggers"]}
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    logging.config.dictConfig(configuration)
    yield text
    root.handlers, root.level = handlers, level
    for name, filters in before.items():
        logging.getLogger(name).filters = filters


def lines(text: io.StringIO, about: str) -> list[dict[str, Any]]:
    assert "canary" not in text.getvalue()
    assert len(text.getvalue()) < 4_000
    result = [json.loads(line) for line in text.getvalue().splitlines()]
    return [line for line in result if about in line["message"]]


def test_a_forbidden_host(written: io.StringIO) -> None:
    assert Client().get("/api/chat/threads", headers={"host": f"{LONG}.example"}).status_code == 400

    (line,) = lines(written, "Request refused")
    assert line["message"] == "Request refused: DisallowedHost"
    assert line["level"] == "warning"
    assert "exception" not in line


def test_a_failed_csrf_check(written: io.StringIO) -> None:
    client = Client(enforce_csrf_checks=True)
    client.post("/admin/login/", {"a": "b"}, headers={"origin": f"https://{LONG}.example"})

    (line,) = lines(written, "Request refused")
    assert line["message"] == "Request refused: csrf: Origin checking failed"
    assert line["level"] == "warning"


def test_a_filter_that_the_admin_does_not_allow(written: io.StringIO, admin_client: Client) -> None:
    answer = admin_client.get("/admin/agents/run/?message__content__startswith=canary")
    assert answer.status_code == 400

    (line,) = lines(written, "Request refused")
    assert (line["message"], line["level"]) == (
        "Request refused: DisallowedModelAdminLookup",
        "warning",
    )


def test_what_somebody_may_not_do_has_no_traceback(written: io.StringIO, client: Client) -> None:
    client.get(f"/{LONG[:60]}")
    assert "exception" not in written.getvalue()
    assert lines(written, "Request")
