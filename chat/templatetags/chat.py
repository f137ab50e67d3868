from datetime import timedelta

from django import template
from django.utils.safestring import SafeString, mark_safe
from django.utils.text import Truncator

from chat.markdown import to_html
from chat.models import Thread

register = template.Library()


@register.filter
def prose(text: str) -> SafeString:
    """What a model wrote, as HTML. A link in it opens beside the conversation."""
    return mark_safe(to_html(text, apart=True))  # noqa: S308  (sanitised)


@register.filter
def heading(thread: Thread) -> str:
    """The title of a thread of `with_preview()`, or the first words of its first question."""
    words = thread.title or " ".join(thread.preview.split())  # type: ignore[attr-defined]
    return Truncator(words).chars(60) or "Untitled"


@register.filter
def seconds(took: timedelta | int | None) -> str:
    """A time span, or a number of milliseconds."""
    if took is None:
        return ""
    whole = took.total_seconds() if isinstance(took, timedelta) else took / 1000
    if whole < 60:
        return f"{whole:.1f} s"
    minutes, rest = divmod(int(whole), 60)
    return f"{minutes} min {rest} s"
