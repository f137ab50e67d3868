"""System checks for combinations of settings that are legal one by one."""

from typing import Any

from django.conf import settings
from django.core.checks import CheckMessage, Error, register
from django.core.checks import Warning as Warn

from agents.tools import TOOLS
from config import misspelt

# A tag of its own: a process without URLs runs these checks, not those that load the URLs.
TAG = "botrealm"


@register(TAG)
def secrets(**_: Any) -> list[CheckMessage]:
    if settings.DEBUG or settings.SECRET_KEY != settings.REALM_SECRET_SEED:
        return []
    return [
        Warn(
            "SECRET_KEY and REALM_SECRET_SEED are equal: a program that issues realm tokens could "
            "forge admin sessions.",
            hint="Set each to its own value.",
            id="botrealm.W003",
        )
    ]


@register(TAG, deploy=True)
def secrets_at_rest(**_: Any) -> list[CheckMessage]:
    if settings.DEVELOPMENT_SECRET not in settings.SECRETS_KEY:
        return []
    return [
        Warn(
            "SECRETS_KEY is the built-in key: the bot's token, the keys of encrypted rooms and the "
            "secrets of webhooks are practically unencrypted.",
            hint="Set SECRETS_KEY: openssl rand -hex 32. Then: python manage.py rotate_secrets",
            id="botrealm.W005",
        )
    ]


@register(TAG)
def names(**_: Any) -> list[CheckMessage]:
    return [
        Warn(each, hint="docs/reference/settings.md has all names.", id="botrealm.W006")
        for each in misspelt.sentences()
    ]


@register(TAG)
def model_endpoint(**_: Any) -> list[CheckMessage]:
    if settings.OPENAI_API_KEY or settings.OPENAI_BASE_URL:
        return []
    return [
        Warn(
            "No model is configured: every answer is an echo of its message.",
            hint="Set OPENAI_API_KEY, or OPENAI_BASE_URL for another compatible endpoint.",
            id="botrealm.W001",
        )
    ]


@register(TAG)
def allowed_models(**_: Any) -> list[CheckMessage]:
    summary, allowed = settings.CHAT_SUMMARY_MODEL, settings.CHAT_ALLOWED_MODELS
    if not summary or not allowed or summary in allowed:
        return []
    return [
        Warn(
            f"CHAT_SUMMARY_MODEL={summary!r} is not in CHAT_ALLOWED_MODELS.",
            hint="Ignore this if users may not request it; otherwise add it to the list.",
            id="botrealm.W002",
        )
    ]


@register(TAG)
def anonymous_chat(**_: Any) -> list[CheckMessage]:
    if settings.DEBUG or not settings.CHAT_ALLOW_ANONYMOUS:
        return []
    return [
        Warn(
            "CHAT_ALLOW_ANONYMOUS is on although DEBUG is off: anyone can spend your tokens.",
            hint="Turn it off unless a proxy in front of the server admits only your users.",
            id="botrealm.W004",
        )
    ]


@register(TAG)
def retention(**_: Any) -> list[CheckMessage]:
    """Check that an event is kept until it is too old to be handled again."""
    age = settings.BOT_RUNNER_MAX_EVENT_AGE
    return [
        Error(
            f"{name} is not longer than BOT_RUNNER_MAX_EVENT_AGE: an event could be deleted and "
            "then handled again.",
            hint=f"BOT_RUNNER_MAX_EVENT_AGE is {age / 86400:.3g} days; keep events for longer.",
            id="botrealm.E004",
        )
        for name in ("BOT_RUNNER_EVENT_RETENTION_DAYS", "BOT_RUNNER_REPLY_RETENTION_DAYS")
        if getattr(settings, name) * 86400 <= age
    ]


@register(TAG)
def tools(**_: Any) -> list[CheckMessage]:
    return [
        Error(
            f"AGENT_TOOLS names an unknown tool: {name!r}.",
            hint=f"The tools are: {', '.join(TOOLS)}.",
            id="botrealm.E003",
        )
        for name in settings.AGENT_TOOLS
        if name not in TOOLS
    ]
