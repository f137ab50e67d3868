"""Query strings of lists: none is an error of the server."""

from itertools import product
from typing import Any

import pytest
from django.contrib import admin
from django.db import models
from django.test import Client
from django.urls import resolve
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from realm.models import User
from tests.console.rows import one_of_each

resolve("/admin/")  # registers the pages
# A failed statement must not take the later ones with it.
pytestmark = pytest.mark.django_db(transaction=True)
LISTS = sorted(admin.site._registry, key=lambda model: model._meta.label)
VALUES = [
    "", "(", "[", "a", "\x00", "99999", "-1", "0", "9" * 400, "1e400", "NaN", "Infinity",
    "99999-01-01", "2026-13-45", "2026-11-21T25:61", "null", "a,b,c", ",", "1,2", "%", "\ud7ff", "{}",
    "true", "x" * 3000,
]  # fmt: skip
LOOKUPS = [
    "", "__exact", "__iexact", "__in", "__isnull", "__range", "__gt", "__gte", "__lt", "__contains",
    "__icontains", "__startswith", "__regex", "__iregex", "__year", "__year__gte", "__month", "__day",
    "__week_day", "__date", "__date__year", "__time", "__hour", "__quarter", "__iso_year", "__nosuch",
    "__",
    "__id", "__id__year", "__pk", "__has_key", "__contained_by", "__len", "__search",
    "__trigram_similar",
]  # fmt: skip
OTHERS = ["o", "p", "q", "e", "all", "_facets", "_popup", "_to_field", "period", "nosuch"]
PAGES = [*VALUES, "-0", "1.2.3", "-1.2", "1.-1", "..", "2", "50", "51"]


@pytest.fixture
def browser() -> Client:
    one_of_each()
    user = User.objects.create_superuser("root", password="secret")
    client = Client(raise_request_exception=False)
    client.force_login(user)
    return client


def path_of(model: type[models.Model]) -> str:
    return f"/admin/{model._meta.app_label}/{model._meta.model_name}/"


def check(browser: Client, model: type[models.Model], query: dict[str, Any]) -> None:
    response = browser.get(path_of(model), query)
    assert response.status_code in (200, 302, 400), f"{model._meta.label}?{query}"


@pytest.mark.parametrize("model", LISTS, ids=lambda model: model._meta.label_lower)
def test_no_query_of_a_list_is_a_server_error(browser: Client, model: type[models.Model]) -> None:
    fields = [field.name for field in model._meta.get_fields() if isinstance(field, models.Field)]
    # A sample of all combinations: each lookup and each value several times, each field at least ten.
    combinations = [*product(fields, LOOKUPS, VALUES)]
    step = max(1, len(combinations) // max(60, 10 * len(fields))) | 1
    for field, lookup, value in combinations[::step]:
        check(browser, model, {f"{field}{lookup}": value})
    for name, value in [*product(OTHERS, PAGES)][::7]:
        check(browser, model, {name: value})


@pytest.mark.parametrize("model", LISTS, ids=lambda model: model._meta.label_lower)
def test_the_cases_that_were_errors(browser: Client, model: type[models.Model]) -> None:
    for column in ("created_at", "date_joined", "id", "pk", "at", "updated_at"):
        for lookup, value in (("year", "99999"), ("regex", "("), ("range", "a"), ("gte", "x")):
            check(browser, model, {f"{column}__{lookup}": value})


def test_regular_expressions_are_not_offered(browser: Client) -> None:
    for lookup in ("id__regex", "id__iregex", "thread__id__regex", "created_at__year__regex"):
        assert browser.get("/admin/agents/run/", {lookup: "a"}).status_code == 400


def test_an_invalid_filter_leads_to_the_list_with_a_message(browser: Client) -> None:
    response = browser.get("/admin/agents/run/?created_at__year=99999", follow=True)
    assert response.status_code == 200
    assert "The filter in the address is not valid" in response.text
    good = browser.get("/admin/agents/run/?created_at__year=2026")
    assert good.status_code == 200


def test_made_up_queries(browser: Client) -> None:
    @settings(
        max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), database=None
    )
    @given(
        model=st.sampled_from(LISTS),
        lookup=st.sampled_from(LOOKUPS),
        value=st.one_of(st.sampled_from(VALUES), st.text(max_size=20)),
        data=st.data(),
    )
    def some(model: Any, lookup: str, value: str, data: Any) -> None:
        names = [field.name for field in model._meta.get_fields()]
        name = data.draw(st.sampled_from([*names, *OTHERS]))
        check(browser, model, {f"{name}{lookup}": value.encode(errors="ignore").decode()})

    some()
