from datetime import timedelta
from typing import Any

from django import template
from django.utils.safestring import SafeString, mark_safe
from django.utils.text import Truncator

from chat.models import Thread
from chat.rendering import page_of
from lib import formats

register = template.Library()


@register.simple_tag(takes_context=True)
def prose(context: dict[str, Any], text: str) -> SafeString:
    """What a model wrote, as HTML. A link in it opens beside the conversation."""
    return mark_safe(page_of(context["request"]).html(text))  # noqa: S308  (sanitised)


@register.filter
def heading(thread: Thread) -> str:
    """The title of a thread of `with_preview()`, or the first words of its first question; the id of
    the room that it belongs to."""
    preview = " ".join(thread.preview.split())  # type: ignore[attr-defined]
    words = thread.title or thread.room_id or preview
    return Truncator(words).chars(100) or "Untitled"


@register.filter
def duration(took: timedelta | int | None) -> str:
    """A time span, or a number of milliseconds."""
    ms = took.total_seconds() * 1000 if isinstance(took, timedelta) else took
    return "" if ms is None else formats.duration(ms)
