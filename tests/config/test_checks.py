from typing import Any

import pytest
from django.core.checks import run_checks

GOOD = {
    "DEBUG": False,
    "SECRET_KEY": "a" * 50,
    "REALM_SECRET_SEED": "b" * 50,
    "CHAT_ALLOW_ANONYMOUS": False,
    "OPENAI_API_KEY": "sk-1",
}


@pytest.mark.parametrize(
    ("changed", "found"),
    [
        ({}, []),
        ({"SECRET_KEY": "b" * 50}, ["botrealm.W003"]),
        ({"OPENAI_API_KEY": ""}, ["botrealm.W001"]),
        ({"OPENAI_API_KEY": "", "OPENAI_BASE_URL": "http://localhost:1/v1"}, []),
        ({"CHAT_ALLOWED_MODELS": ["a"], "CHAT_SUMMARY_MODEL": "b"}, ["botrealm.W002"]),
        ({"CHAT_ALLOWED_MODELS": ["a", "b"], "CHAT_SUMMARY_MODEL": "b"}, []),
        ({"CHAT_ALLOW_ANONYMOUS": True}, ["botrealm.W004"]),
        ({"BOT_RUNNER_MAX_EVENT_AGE": 7 * 86400.0 - 1}, []),
        ({"BOT_RUNNER_MAX_EVENT_AGE": 7 * 86400.0}, ["botrealm.E004"]),
        ({"BOT_RUNNER_REPLY_RETENTION_DAYS": 1}, ["botrealm.E004"]),
        ({"AGENT_TOOLS": ["current_time"]}, []),
        ({"AGENT_TOOLS": ["current_time", "launch"]}, ["botrealm.E003"]),
    ],
)
def test_combinations(settings: Any, changed: dict[str, Any], found: list[str]) -> None:
    for name, value in (GOOD | changed).items():
        setattr(settings, name, value)

    messages = [m for m in run_checks() if (m.id or "").startswith("botrealm")]

    assert [m.id for m in messages] == found
    assert all(m.hint for m in messages)
