"""Lists of a million rows: what a page of one costs does not grow with the table."""

import uuid
from datetime import timedelta
from functools import cached_property
from typing import Any

from django.contrib import messages
from django.contrib.admin import ShowFacets, SimpleListFilter
from django.contrib.admin.views.main import PAGE_VAR, SEARCH_VAR
from django.core.exceptions import ValidationError
from django.core.paginator import Paginator
from django.db.models import Model, QuerySet
from django.http import HttpRequest, HttpResponse, HttpResponseRedirect
from django.utils import timezone

MAX_PAGES = 50
MAX_COUNT = 10_000
MAX_FOUND = 1000


class AtLeast(int):
    """A number of which it is only known that there are more."""

    def __str__(self) -> str:
        return f"{int(self):,}+"


class CappedPaginator(Paginator):
    """Counts no further than people look, and skips no further either: an OFFSET reads all that it
    leaves out."""

    @cached_property
    def count(self) -> int:
        rows: Any = self.object_list
        # By their keys: what a list tells beside each row would be made of every row that is counted.
        counted = rows.order_by().values("pk")[: MAX_COUNT + 1].count()
        return AtLeast(MAX_COUNT) if counted > MAX_COUNT else counted

    @cached_property
    def num_pages(self) -> int:
        return min(super().num_pages, MAX_PAGES)


class Period(SimpleListFilter):
    """The last hour, day, week or month; the last day where nothing else is asked for. Name it last
    in `list_filter`: what filters before it have not taken is a link to something certain, which is
    to be found however old it is."""

    title = "when"
    parameter_name = "period"
    template = "admin/filter.html"
    column = "created_at"
    DEFAULT = "24h"
    LENGTHS = {
        "1h": ("The last hour", timedelta(hours=1)),
        "24h": ("The last 24 hours", timedelta(hours=24)),
        "7d": ("The last 7 days", timedelta(days=7)),
        "30d": ("The last 30 days", timedelta(days=30)),
    }

    def __init__(self, request: HttpRequest, params: Any, model: Any, model_admin: Any) -> None:
        others = set(params) - {self.parameter_name}
        self.is_certain = bool(others or request.GET.get(SEARCH_VAR))
        super().__init__(request, params, model, model_admin)

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, str]]:
        return [(key, title) for key, (title, _) in self.LENGTHS.items()]

    def queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> QuerySet[Any]:
        chosen = self.value()
        if chosen in self.LENGTHS:
            return self._since(queryset, chosen)
        if chosen is None and not self.is_certain:
            recent = self._since(queryset, self.DEFAULT)
            if recent.exists():
                self.used_parameters[self.parameter_name] = self.DEFAULT
                return recent
        return queryset

    def choices(self, changelist: Any) -> Any:
        chosen = self.value()
        yield {
            "selected": chosen not in self.LENGTHS,
            "query_string": changelist.get_query_string({self.parameter_name: "all"}),
            "display": "Whenever",
        }
        for key, title in self.lookup_choices:
            yield {
                "selected": chosen == key,
                "query_string": changelist.get_query_string({self.parameter_name: key}),
                "display": title,
            }

    def _since(self, queryset: QuerySet[Any], key: str) -> QuerySet[Any]:
        return queryset.filter(**{f"{self.column}__gte": timezone.now() - self.LENGTHS[key][1]})


class Paged:
    """An admin's list with those rules."""

    paginator: type[Paginator] = CappedPaginator
    # Numbers beside each filter are a count of all rows each.
    show_facets = ShowFacets.NEVER
    show_full_result_count = False

    def changelist_view(self, request: HttpRequest, extra_context: Any = None) -> HttpResponse:
        page = request.GET.get(PAGE_VAR, "")
        if page.isdecimal() and int(page) > MAX_PAGES:
            messages.warning(
                request,
                f"Only the first {MAX_PAGES} pages can be turned to. To come to what lies deeper, "
                "choose a time or another filter, or search for an id.",
            )
            rest = request.GET.copy()
            del rest[PAGE_VAR]
            return HttpResponseRedirect(f"{request.path}?{rest.urlencode()}")
        response: HttpResponse = super().changelist_view(request, extra_context)  # type: ignore[misc]
        return response

    def get_search_results(
        self, request: HttpRequest, queryset: QuerySet[Any], search_term: str
    ) -> tuple[QuerySet[Any], bool]:
        """Rows that have exactly what is searched for in one of the fields. Each is looked up by its
        own index: an OR over several tables reads all rows."""
        fields: list[str] = list(self.get_search_fields(request))  # type: ignore[attr-defined]
        if not search_term or not all(name.startswith("=") for name in fields):
            found: tuple[QuerySet[Any], bool] = super().get_search_results(  # type: ignore[misc]
                request, queryset, search_term
            )
            return found
        model: type[Model] = queryset.model
        lookups = [
            model._default_manager.order_by().filter(**{path: search_term.strip()}).values("pk")
            for path in (name.removeprefix("=") for name in fields)
            if _fits(model, path, search_term.strip())
        ]
        if not lookups:
            return queryset.none(), False
        first, *others = lookups
        keys = [row["pk"] for row in first.union(*others)[:MAX_FOUND]]
        return queryset.filter(pk__in=keys), False


def _fits(model: type[Model], path: str, term: str) -> bool:
    """Whether the field could have this value at all."""
    field: Any = None
    for name in path.split("__"):
        field = model._meta.get_field(name)
        model = field.related_model or model
    try:
        value = field.to_python(term)
        field.run_validators(value)
    except (ValidationError, ValueError):
        return False
    return isinstance(value, uuid.UUID | str) or str(value) == term
