"""Usage and cost by user, room, model and day."""

from datetime import date, timedelta
from typing import Any

from django.contrib import admin
from django.db.models import Sum
from django.http import HttpRequest, HttpResponse
from django.template.response import TemplateResponse

from agents.models import Usage, today
from agents.usage import limits, prices
from console.base import EmptyState, ReadOnlyAdmin
from console.home import runs_url
from lib.formats import money

GROUPS = {"user": "User", "place": "Room", "model": "Model", "day": "Day"}
SUMS = ("runs", "failed", "prompt_tokens", "completion_tokens", "cost", "unpriced")
NO_VALUE = {"user": "none (anonymous, other programs)", "place": "none (HTTP, other programs)"}
MAX_ROWS = 200
MAX_USES = 20
# The period in links to the list of runs.
RUN_PERIODS = {"today": "24h", "7d": "7d"}


def periods(day: date) -> dict[str, tuple[str, date, date]]:
    """Return title, first and last day (both included) by key."""
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
    """A page of sums in place of the list of rows."""

    empty = EmptyState("No usage in this period.")
    list_display = ["day", "user", "place", "model", *SUMS]

    def changelist_view(self, request: HttpRequest, extra_context: Any = None) -> HttpResponse:
        if not self.has_view_permission(request):
            return super().changelist_view(request, extra_context)  # refuses
        choices = periods(today())
        by = request.GET.get("by", "") if request.GET.get("by") in GROUPS else "user"
        period = request.GET.get("period", "") if request.GET.get("period") in choices else "7d"
        _, first, last = choices[period]
        usage = Usage.objects.filter(day__range=(first, last))
        sums = {name: Sum(name) for name in SUMS}
        order = "-day" if by == "day" else "-cost"
        rows = list(
            usage.order_by().values(by).annotate(**sums).order_by(order, by)[: MAX_ROWS + 1]
        )
        currency, run_period = prices.currency(), RUN_PERIODS.get(period, "30d")
        context = {
            **self.admin_site.each_context(request),
            "title": "Usage",
            "opts": self.opts,
            "choices": [
                ("By", [_choice(GROUPS[key], key, period, chosen=key == by) for key in GROUPS]),
                (
                    "Time",
                    [_choice(choices[key][0], by, key, chosen=key == period) for key in choices],
                ),
            ],
            "empty": self.empty,
            "by_title": GROUPS[by],
            "rows": [_row(row, by, currency, run_period) for row in rows[:MAX_ROWS]],
            "is_truncated": len(rows) > MAX_ROWS,
            "uses": [_use(use, currency) for use in limits.nearest(MAX_USES)],
            "total": _row({by: "Total", **usage.aggregate(**sums)}, "total", currency, ""),
        }
        return TemplateResponse(request, "console/usage.html", context)


def _use(use: limits.LimitUse, currency: str) -> dict[str, Any]:
    """Return usage and limit as text; empty without a limit."""

    def of(used: Any, limit: Any) -> str:
        return f"{used} of {limit}"

    own = use.scope.limits
    return {
        "kind": use.scope.kind.label,
        "name": use.scope.name,
        "is_reached": use.share >= 1,
        "share": f"{use.share:.0%}",
        "unfinished": of(f"{use.unfinished:,}", f"{own.unfinished:,}") if own.unfinished else "",
        "tokens": of(f"{use.tokens:,}", f"{own.tokens:,}") if own.tokens else "",
        "cost": of(money(use.cost, currency), money(own.cost, currency)) if own.cost else "",
    }


def _choice(title: str, by: str, period: str, *, chosen: bool) -> dict[str, Any]:
    return {"title": title, "query": f"by={by}&period={period}", "chosen": chosen}


def _row(row: dict[str, Any], by: str, currency: str, period: str) -> dict[str, Any]:
    value = row.get(by, "Total")
    cost = money(row["cost"] or 0, currency)
    sums = {name: f"{row[name] or 0:,}" for name in SUMS[:4]}
    url = ""
    if value and by in ("place", "model"):
        url = runs_url(**{by: value, "period": period})
    elif value and by == "user":
        url = runs_url(thread__owner__username=value, period=period)
    return {
        **sums,
        "name": str(value) or NO_VALUE.get(by, "–"),  # noqa: RUF001
        "cost": "no price" if row["unpriced"] and not row["cost"] else cost,
        "unpriced": row["unpriced"],
        "link": url,
    }
