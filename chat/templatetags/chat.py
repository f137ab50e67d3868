from datetime import timedelta
from typing import Any

from django import template
from django.utils.safestring import SafeString, mark_safe
from django.utils.text import Truncator

from chat.models import Thread
from chat.rendering import budget_of
from lib import formats

register = template.Library()


@register.simple_tag(takes_context=True)
def prose(context: dict[str, Any], text: str) -> SafeString:
    """Render model output as HTML. Links open in a new tab."""
    return mark_safe(budget_of(context["request"]).html(text))  # noqa: S308  (sanitised)


@register.filter
def heading(thread: Thread) -> str:
    """Return the title of a thread of `with_preview()`, the id of its room or its first words."""
    preview = " ".join(thread.preview.split())  # type: ignore[attr-defined]
    words = thread.title or thread.room_id or preview
    return Truncator(words).chars(100) or "Untitled"


@register.filter
def duration(took: timedelta | int | None) -> str:
    """Format a time span or a number of milliseconds."""
    ms = took.total_seconds() * 1000 if isinstance(took, timedelta) else took
    return "" if ms is None else formats.duration(ms)
