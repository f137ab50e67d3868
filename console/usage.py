"""What users, rooms and models took of the models, and what it cost."""

from datetime import date, timedelta
from typing import Any

from django.contrib import admin
from django.db.models import Sum
from django.http import HttpRequest, HttpResponse
from django.template.response import TemplateResponse

from agents.models import Usage, today
from agents.usage import limits, prices
from console.base import Empty, ReadOnlyAdmin
from console.home import runs
from lib.formats import money

GROUPS = {"user": "User", "place": "Room", "model": "Model", "day": "Day"}
SUMS = ("runs", "failed", "prompt_tokens", "completion_tokens", "cost", "unpriced")
NOBODY = {"user": "nobody (anonymous, other programs)", "place": "no room (HTTP, other programs)"}
MAX_ROWS = 200
MAX_USES = 20
# The period that the list of runs is linked with.
RUNS = {"today": "24h", "7d": "7d"}


def periods(day: date) -> dict[str, tuple[str, date, date]]:
    """First and last day, both included."""
    month = day.replace(day=1)
    last_month = month - timedelta(days=1)
    return {
        "today": ("Today", day, day),
        "yesterday": ("Yesterday", day - timedelta(days=1), day - timedelta(days=1)),
        "7d": ("7 days", day - timedelta(days=6), day),
        "month": ("This month", month, day),
        "last": ("Last month", last_month.replace(day=1), last_month),
        "all": ("All", date.min, date.max),
    }


@admin.register(Usage)
class UsageAdmin(ReadOnlyAdmin):
    """A page of its own in the place of the list: its rows mean little one by one."""

    empty = Empty("Nothing was used in this time.")
    list_display = ["day", "user", "place", "model", *SUMS]

    def changelist_view(self, request: HttpRequest, extra_context: Any = None) -> HttpResponse:
        if not self.has_view_permission(request):
            return super().changelist_view(request, extra_context)  # refuses
        known = periods(today())
        by = request.GET.get("by", "") if request.GET.get("by") in GROUPS else "user"
        period = request.GET.get("period", "") if request.GET.get("period") in known else "7d"
        _, first, last = known[period]
        used = Usage.objects.filter(day__range=(first, last))
        sums = {name: Sum(name) for name in SUMS}
        order = "-day" if by == "day" else "-cost"
        rows = list(used.order_by().values(by).annotate(**sums).order_by(order, by)[: MAX_ROWS + 1])
        currency = prices.currency()
        context = {
            **self.admin_site.each_context(request),
            "title": "Usage",
            "opts": self.opts,
            "choices": [
                ("By", [_choice(GROUPS[key], key, period, chosen=key == by) for key in GROUPS]),
                ("Time", [_choice(known[key][0], by, key, chosen=key == period) for key in known]),
            ],
            "empty": self.empty,
            "by_title": GROUPS[by],
            "rows": [_row(row, by, currency, RUNS.get(period, "30d")) for row in rows[:MAX_ROWS]],
            "more": len(rows) > MAX_ROWS,
            "uses": [_use(use, currency) for use in limits.nearest(MAX_USES)],
            "total": _row({by: "Total", **used.aggregate(**sums)}, "total", currency, ""),
        }
        return TemplateResponse(request, "console/usage.html", context)


def _use(use: limits.Use, currency: str) -> dict[str, Any]:
    """Taken and limit, in words; empty for what has no limit."""

    def beside(taken: Any, most: Any) -> str:
        return f"{taken} of {most}"

    mine = use.scope.limits
    return {
        "kind": use.scope.kind.label,
        "name": use.scope.name,
        "is_reached": use.share >= 1,
        "share": f"{use.share:.0%}",
        "waiting": beside(f"{use.waiting:,}", f"{mine.waiting:,}") if mine.waiting else "",
        "tokens": beside(f"{use.tokens:,}", f"{mine.tokens:,}") if mine.tokens else "",
        "cost": beside(money(use.cost, currency), money(mine.cost, currency)) if mine.cost else "",
    }


def _choice(title: str, by: str, period: str, *, chosen: bool) -> dict[str, Any]:
    return {"title": title, "query": f"by={by}&period={period}", "chosen": chosen}


def _row(row: dict[str, Any], by: str, currency: str, shown_for: str) -> dict[str, Any]:
    value = row.get(by, "Total")
    cost = money(row["cost"] or 0, currency)
    shown = {name: f"{row[name] or 0:,}" for name in SUMS[:4]}
    link = ""
    if value and by in ("place", "model"):
        link = runs(**{by: value, "period": shown_for})
    elif value and by == "user":
        link = runs(thread__owner__username=value, period=shown_for)
    return {
        **shown,
        "name": str(value) or NOBODY.get(by, "–"),  # noqa: RUF001
        "cost": "no price" if row["unpriced"] and not row["cost"] else cost,
        "unpriced": row["unpriced"],
        "link": link,
    }
