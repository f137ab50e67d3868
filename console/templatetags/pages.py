"""Template tags of the console: durations, times, states, links and masked messages."""

from datetime import datetime
from typing import Any

from django import template
from django.contrib.admin.utils import quote
from django.db.models import Model
from django.urls import reverse
from django.utils import timezone
from django.utils.html import format_html
from django.utils.safestring import SafeString, mark_safe

from chat import rendering

# Modules, not functions of `base`: the theme loads all tag libraries while `base` is being imported.
from console import base, trace
from lib import formats

register = template.Library()

COLOURS = {
    **dict.fromkeys(("completed", "sent", "handled", "joined", "enabled"), "good"),
    **dict.fromkeys(("failed", "lost", "dropped", "refused", "disabled"), "bad"),
    **dict.fromkeys(("processing", "ready", "invited"), "busy"),
    **dict.fromkeys(("retried", "requeued", "cancelled", "ignored", "left"), "odd"),
}


@register.filter
def duration(seconds: float | None) -> str:
    return formats.duration(None if seconds is None else 1000 * max(seconds, 0))


@register.filter
def moment(when: datetime | None) -> str:
    """Format a time to the millisecond, in the server's time zone."""
    if when is None:
        return "-"
    return f"{timezone.localtime(when):%Y-%m-%d %H:%M:%S.%f}"[:-3]


@register.filter
def ago(when: datetime | None) -> str:
    if when is None:
        return "never"
    return f"{duration((timezone.now() - when).total_seconds())} ago"


@register.filter
def turn(position: int) -> int:
    """Return the number of the turn of a message, from 1."""
    return position // 2 + 1


@register.filter
def state(value: str) -> SafeString:
    return format_html('<span class="cn-state cn-{}">{}</span>', COLOURS.get(value, "plain"), value)


@register.filter
def money(cost: int | None) -> str:
    if cost is None:
        return "no price"
    return f"{formats.amount(cost):.6f}".rstrip("0").rstrip(".")


@register.filter
def link(row: Model | None, text: str = "") -> str:
    """Return a link to the page of a row."""
    if row is None:
        return "-"
    meta = row._meta
    url = reverse(f"admin:{meta.app_label}_{meta.model_name}_change", args=[quote(row.pk)])
    return format_html('<a class="cn-link" href="{}">{}</a>', url, text or str(row))


@register.filter
def page(row: Model) -> str:
    """Return the URL of a row's page."""
    meta = row._meta
    return reverse(f"admin:{meta.app_label}_{meta.model_name}_change", args=[quote(row.pk)])


@register.simple_tag
def took(start: datetime, end: datetime | None) -> str:
    return duration(((end or timezone.now()) - start).total_seconds())


@register.simple_tag
def matrix_to(room_id: str, event_id: str = "") -> str:
    return trace.matrix_to(room_id, event_id)


@register.simple_tag(takes_context=True)
def message_text(context: dict[str, Any], text: Any) -> str:
    """Return a text of the page's owner, masked for users who may not read it."""
    return base.body(context["request"], text, context["owner"])


@register.simple_tag(takes_context=True)
def formatted(context: dict[str, Any], text: str) -> str:
    """Render a text of the page's owner as Markdown, masked for users who may not read it."""
    if not base.may_read(context["request"], context["owner"]):
        return base.body(context["request"], text, context["owner"])
    return mark_safe(rendering.budget_of(context["request"]).html(text))  # noqa: S308 (sanitised)
