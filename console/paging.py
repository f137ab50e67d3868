"""Paging, period filter and search of lists whose cost per page does not grow with the table."""

import logging
import uuid
from datetime import timedelta
from functools import cached_property
from typing import Any

from django.contrib import messages
from django.contrib.admin import ShowFacets, SimpleListFilter
from django.contrib.admin.views.main import ERROR_FLAG, PAGE_VAR, SEARCH_VAR
from django.core.exceptions import PermissionDenied, SuspiciousOperation, ValidationError
from django.core.paginator import Paginator
from django.db.models import Model, QuerySet
from django.db.models.constants import LOOKUP_SEP
from django.http import Http404, HttpRequest, HttpResponse, HttpResponseRedirect
from django.template.response import TemplateResponse
from django.utils import timezone

logger = logging.getLogger(__name__)

MAX_PAGES = 50
MAX_COUNT = 10_000
MAX_FOUND = 1000


REFUSED_LOOKUPS = frozenset({"regex", "iregex"})
# What Django answers with a status of its own.
ANSWERED = (SuspiciousOperation, PermissionDenied, Http404)


def _without_query(request: HttpRequest) -> HttpResponse:
    """Show the list without the query, which is not valid."""
    messages.error(request, "The filter in the address is not valid, so it was removed.")
    return HttpResponseRedirect(request.path)


class AtLeast(int):
    """A lower bound of a count, displayed as "10,000+"."""

    def __str__(self) -> str:
        return f"{int(self):,}+"


class CappedPaginator(Paginator):
    """A paginator with a bounded count and a bounded offset: a database reads every row that an OFFSET
    skips."""

    @cached_property
    def count(self) -> int:
        rows: Any = self.object_list
        # Keys only: the list's annotations would be computed for every counted row.
        count = rows.order_by().values("pk")[: MAX_COUNT + 1].count()
        return AtLeast(MAX_COUNT) if count > MAX_COUNT else count

    @cached_property
    def num_pages(self) -> int:
        return min(super().num_pages, MAX_PAGES)


class PeriodFilter(SimpleListFilter):
    """Filters by the last hour, day, week or month; by default the last day. A search, or a link
    parameter that no filter has claimed, switches the default off: such rows must be found at any age.
    Keep it last in `list_filter`, after the filters that claim parameters."""

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
        self.is_specific = bool(others or request.GET.get(SEARCH_VAR))
        super().__init__(request, params, model, model_admin)

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, str]]:
        return [(key, title) for key, (title, _) in self.LENGTHS.items()]

    def queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> QuerySet[Any]:
        chosen = self.value()
        if chosen in self.LENGTHS:
            return self._since(queryset, chosen)
        if chosen is None and not self.is_specific:
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
            "display": "Any time",
        }
        for key, title in self.lookup_choices:
            yield {
                "selected": chosen == key,
                "query_string": changelist.get_query_string({self.parameter_name: key}),
                "display": title,
            }

    def _since(self, queryset: QuerySet[Any], key: str) -> QuerySet[Any]:
        return queryset.filter(**{f"{self.column}__gte": timezone.now() - self.LENGTHS[key][1]})


class PagedMixin:
    """An admin list with bounded paging and search by index."""

    paginator: type[Paginator] = CappedPaginator
    # Facets would count all rows once per choice of a filter.
    show_facets = ShowFacets.NEVER
    show_full_result_count = False

    def changelist_view(self, request: HttpRequest, extra_context: Any = None) -> HttpResponse:
        page = request.GET.get(PAGE_VAR, "")
        if page.isdecimal() and int(page) > MAX_PAGES:
            messages.warning(
                request,
                f"Only the first {MAX_PAGES} pages are available. Choose a period or another filter, "
                "or search for an ID.",
            )
            rest = request.GET.copy()
            del rest[PAGE_VAR]
            return HttpResponseRedirect(f"{request.path}?{rest.urlencode()}")
        try:
            response: HttpResponse = super().changelist_view(request, extra_context)  # type: ignore[misc]
            if isinstance(response, TemplateResponse):
                response.render()  # which reads the rows
        except ANSWERED:
            raise
        except Exception as error:
            # Of a filter that the database cannot apply; any other shows in the list without a query.
            if not request.GET:
                raise
            logger.warning("List refused: %s for its query", type(error).__name__)
            return _without_query(request)
        if response.get("Location", "").endswith(f"?{ERROR_FLAG}=1"):
            return _without_query(request)
        return response

    def lookup_allowed(self, lookup: str, value: Any, request: HttpRequest) -> bool:
        """Refuse regular expressions: one may take the database minutes."""
        if not REFUSED_LOOKUPS.isdisjoint(lookup.split(LOOKUP_SEP)):
            return False
        allowed: bool = super().lookup_allowed(lookup, value, request)  # type: ignore[misc]
        return allowed

    def get_search_results(
        self, request: HttpRequest, queryset: QuerySet[Any], search_term: str
    ) -> tuple[QuerySet[Any], bool]:
        """Return the rows where one of the fields equals the term. One query per field uses its index;
        an OR over several tables would read all rows."""
        fields: list[str] = list(self.get_search_fields(request))  # type: ignore[attr-defined]
        if not search_term or not all(name.startswith("=") for name in fields):
            result: tuple[QuerySet[Any], bool] = super().get_search_results(  # type: ignore[misc]
                request, queryset, search_term
            )
            return result
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
    """Return whether the value is valid for the field."""
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
