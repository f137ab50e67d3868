"""What the server writes cannot be sent along, and what it tells is what is listed here."""

import json
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from django.contrib import admin
from django.contrib.auth.models import Group
from django.db import models
from django.db.models import Model
from django.test import RequestFactory
from django.urls import resolve
from rest_framework_json_api.utils import format_field_name

from agents.models import Limit, Price, Run
from agents.runs import actions, execution
from chat.models import Message, Thread
from realm import tokens
from realm.models import BotCommand, BotRegistration, User
from tests import factories
from tests.realm.conftest import Client, a_filter, client_of
from tests.security import access
from tests.security.routes import address
from tests.security.world import owned_by, visitor
from webhooks.models import Subscription

pytestmark = pytest.mark.django_db
URL = "https://hooks.example.org/runs"
STOLEN = uuid.UUID("57013a00-0000-4000-8000-000000000000")


@pytest.fixture(autouse=True)
def _settings(settings: Any) -> None:
    settings.HOOKS_ALLOWED_HOSTS = ["hooks.example.org"]
    settings.CHAT_ALLOW_ANONYMOUS = False
    # The admin's pages are registered when its addresses are first looked up.
    resolve("/admin/")


@dataclass(frozen=True)
class Writing:
    """A request that makes or changes rows of these models; `sent` is all that it may say of them."""

    method: str
    path: str
    sent: dict[str, Any]
    rows: tuple[type[Model], ...]
    kind: str = ""  # of a JSON:API document
    form: bool = False


ASKED = (Thread, Message, Run)
WRITINGS = {
    "registration": Writing(
        "POST",
        "/_bot-registration",
        {"username": "@alice:localhost"},
        (BotRegistration,),
        "bot-registration",
    ),
    "command": Writing(
        "POST",
        "/_bot-commands",
        {"botId": "(bot)", "command": "ping", "filter": a_filter()},
        (BotCommand,),
        "bot-command",
    ),
    "webhook": Writing(
        "POST",
        "/_webhook-subscription",
        {"url": "(url)", "botId": None, "events": ["run.failed"]},
        (Subscription,),
        "webhook-subscription",
    ),
    "question": Writing(
        "POST",
        "/api/messages",
        {
            "content": "x",
            "model": None,
            "correlationId": None,
            "whenBusy": None,
            "deadlineSeconds": None,
        },
        ASKED,
        "messages",
    ),
    "plain question": Writing(
        "POST",
        "/api/chat/messages",
        {
            "content": "x",
            "model": None,
            "correlationId": None,
            "whenBusy": None,
            "deadlineSeconds": None,
            "threadId": None,
        },
        ASKED,
    ),
    "thread": Writing(
        "PATCH", "/api/chat/threads/(thread)", {"title": "x", "archived": False}, (Thread,)
    ),
    "question of a form": Writing("POST", "/", {"content": "x", "model": ""}, ASKED, form=True),
    "thread of a form": Writing(
        "POST", "/threads/(thread)/change", {"title": "x"}, (Thread,), form=True
    ),
}


def stolen(field: Any, bob: User) -> Any:
    """What somebody would like to have in a column."""
    if field.is_relation:
        return bob.pk if field.related_model is User else field.related_model.objects.first().pk
    if isinstance(field, models.BooleanField):
        return not field.get_default()
    if isinstance(field, models.UUIDField):
        return str(STOLEN)
    if isinstance(field, models.DateTimeField):
        return "2001-02-03T00:00:00Z"
    if isinstance(field, models.IntegerField | models.DecimalField):
        return 77
    if isinstance(field, models.JSONField):
        return {"stolen": 1}
    chosen = {"status": "failed", "role": "system", "source": "stream"}
    return chosen.get(field.name, "stolen")


def columns(writing: Writing) -> Iterator[Any]:
    for model in writing.rows:
        yield from model._meta.concrete_fields


def hostile(writing: Writing, bob: User) -> dict[str, Any]:
    """Every column by every name that it could have, but for those that may be sent."""
    found: dict[str, Any] = {"pk": str(STOLEN), "ok": False, "is_staff": True, "is_superuser": True}
    for field in columns(writing):
        for name in (field.name, field.attname):
            value = stolen(field, bob)
            found |= {name: value, format_field_name(name): value}
    may = {*writing.sent, "registration", "events"} if writing.kind else set(writing.sent)
    # These are no attributes: tests/security/test_jsonapi_hostile.py.
    may |= {"id", "type"} if writing.kind else set()
    may |= {"thread", "thread_id", "threadId"} if writing.kind == "messages" else set()
    # A form names whom it was made for, and is refused from anybody else.
    may |= {"user"} if writing.form else set()
    return {name: value for name, value in found.items() if name not in may}


def send(writing: Writing, alice: User, ids: dict[str, Any], extra: dict[str, Any]) -> Any:
    def filled(value: Any) -> Any:
        return ids.get(value, value) if isinstance(value, str) else value

    output = {name: filled(value) for name, value in writing.sent.items()}
    path = writing.path.replace("(thread)", ids["(thread)"])
    if writing.form:
        browser = Client()
        browser.force_login(alice)
        flat = {name: str(value) for name, value in extra.items() if value is not None}
        return browser.post(path, flat | output, format="multipart")
    body: dict[str, Any] = extra | output
    if writing.kind:
        related = {"relationships": extra.pop("relationships")} if "relationships" in extra else {}
        body = {"data": {"type": writing.kind, "attributes": extra | output, **related}}
    client = client_of(alice)
    kind = {"content_type": "application/json"} if not writing.kind else {}
    return client.raw(writing.method, path, json.dumps(body, default=str).encode(), **kind)


def made(writing: Writing, ids: dict[str, Any]) -> list[dict[str, Any]]:
    """The newest row of each model, or the one that was changed."""
    rows = []
    for model in writing.rows:
        found = model._default_manager.all()
        if "(thread)" in writing.path:
            found = found.filter(pk=ids["(thread)"])
        rows.append({"(model)": model} | found.order_by("-created_at").values()[0])
    return rows


@pytest.mark.parametrize("name", [name for name, each in WRITINGS.items() if not each.form])
@pytest.mark.parametrize("where", ["attributes", "relationships"])
def test_what_the_server_writes_is_refused_by_name(
    alice: User, bob: User, name: str, where: str
) -> None:
    writing = WRITINGS[name]
    if where == "relationships" and not writing.kind:
        return
    factories.ask("Bob's", owner=bob)
    ids = world_of(alice, bob)
    before = [model._default_manager.count() for model in writing.rows]
    wanted = hostile(writing, bob)
    if where == "relationships":
        linkage = {"data": {"type": "users", "id": str(bob.pk)}}
        wanted = {
            format_field_name(field.name): linkage
            for field in columns(writing)
            if field.is_relation and field.name != "thread"
        } | {"user": {"data": None}, "owner": {"data": None}}
    for key, value in wanted.items():
        extra = {key: value} if where == "attributes" else {"relationships": {key: value}}
        response = send(writing, alice, ids, extra)
        assert response.status_code == 400, key
        assert key in response.content.decode(), key
    assert [model._default_manager.count() for model in writing.rows] == before


def world_of(alice: User, bob: User) -> dict[str, Any]:
    bot, _ = BotRegistration.objects.get_or_create(user=alice, username="@alice:localhost")
    BotRegistration.objects.get_or_create(user=bob, username="@bob:localhost")
    return {
        "(bot)": str(bot.pk),
        "(thread)": factories.ask("x", owner=alice).thread_id,
        "(url)": f"{URL}/{uuid4()}",
    }


def success(response: Any) -> None:
    assert response.status_code in (200, 201, 202, 302), response.content


@pytest.mark.parametrize("name", [name for name, each in WRITINGS.items() if each.form])
def test_what_the_server_writes_cannot_be_sent_by_a_form(alice: User, bob: User, name: str) -> None:
    writing = WRITINGS[name]
    bobs = factories.ask("Bob's", owner=bob)
    execution.execute(bobs.pk)
    first = world_of(alice, bob)
    success(send(writing, alice, first, {}))
    plain = made(writing, first)
    second = world_of(alice, bob)
    success(send(writing, alice, second, hostile(writing, bob)))

    for usual, row in zip(plain, made(writing, second), strict=True):
        model: Any = row.pop("(model)")
        for column, value in row.items():
            field = model._meta.get_field(column)
            if value == usual[column] or field.name in writing.sent:
                continue
            sought = field.to_python(stolen(field, bob)) if not field.is_relation else bob.pk
            assert value != sought, f"{model._meta.label}.{column} was set by the client"
            # Only what is each row's own may differ from a row that nobody meddled with.
            own = field.is_relation or field.unique or isinstance(field, models.DateTimeField)
            assert own or field.name in (
                "correlation_id",
                "request_id",
                "secret",
                "request_event_id",
            )
    assert Thread.objects.get(pk=bobs.thread_id).owner == bob
    assert Run.objects.get(pk=bobs.pk).status == "completed"


# In forms of the admin: what a member of Admin may set, adding and changing; superusers may set more.
FORMS: dict[type[Model], tuple[str, str]] = {
    User: (
        "usable_password username password1 password2",
        "date_joined email first_name groups is_active is_staff last_login last_name "
        "password username",
    ),
    Group: ("name permissions", "name permissions"),
    BotRegistration: ("user", ""),
    BotCommand: ("command filter registration", "command filter registration"),
    Price: (
        "cached completion currency model prompt valid_from",
        "cached completion currency model prompt valid_from",
    ),
    Limit: (
        "bytes_per_day cost_per_day kind messages_per_minute name note runs_unfinished tokens_per_day",
        "bytes_per_day cost_per_day kind messages_per_minute name note runs_unfinished tokens_per_day",
    ),
    Subscription: (
        "on_cancelled on_completed on_failed registration url",
        "on_cancelled on_completed on_failed registration url",
    ),
}
SUPERUSERS = {User: {"is_superuser", "user_permissions", "matrix_user_id"}}


@pytest.mark.parametrize("model", FORMS, ids=lambda model: model._meta.label_lower)
@pytest.mark.parametrize("role", ["admin", "superuser"])
def test_the_fields_of_a_form(model: type[Model], role: str, alice: User) -> None:
    request: Any = RequestFactory().get("/")
    request.user = visitor(role).user
    page = admin.site._registry[model]
    bot = BotRegistration.objects.create(user=alice, username="@alice:localhost")
    rows: dict[Any, Any] = {
        User: alice,
        Group: Group.objects.first(),
        BotRegistration: bot,
        Subscription: Subscription.objects.create(owner=alice, url=URL),
    }
    row = rows.get(model) or model()
    adding, changing = (set(names.split()) for names in FORMS[model])
    if role == "superuser":
        changing |= SUPERUSERS.get(model, set())

    assert set(page.get_form(request, None).base_fields) == adding
    assert set(page.get_form(request, row, change=True).base_fields) == changing


def test_no_other_form_of_the_admin_sets_anything(admin_user: User) -> None:
    request: Any = RequestFactory().get("/")
    request.user = admin_user
    for model, page in admin.site._registry.items():
        if model not in FORMS:
            assert not page.has_add_permission(request), model
            assert not page.has_change_permission(request), model


KEYS = Path(__file__).with_name("keys.txt")


def paths(node: Any, at: str = "") -> set[str]:
    """`threads[].id`: all that a document tells, links left out."""
    if isinstance(node, list):
        return set().union(*(paths(each, f"{at}[]") for each in node)) if node else {f"{at}[]"}
    # The filter of a command is its owner's own.
    if not isinstance(node, dict) or at.endswith("filter"):
        return {at}
    inner = (
        paths(value, f"{at}.{name}".lstrip("."))
        for name, value in node.items()
        if name not in ("links", "jsonapi")
    )
    return set().union(*inner) if node else {at}


def result() -> Iterator[tuple[str, set[str]]]:
    """Of each address of the API that tells something: its keys."""
    someone = visitor("token")
    failed = factories.ask(owner=someone.user, correlation_id="c", deadline_seconds=60)
    actions.cancel(failed)
    client = client_of(someone.user or "")
    client.credentials(HTTP_AUTHORIZATION=f"Bearer {tokens.issue('@token:localhost')}")
    for route, outcomes in access.table().items():
        if not route.startswith(("api", "_")) or "..." in route or route.endswith("/events"):
            continue
        if route in ("api/schema", "api/docs", "_server-session"):
            continue
        if outcomes["GET"][1] == "yes":
            response = someone.send("GET", address(route, someone.ids))
            assert response.status_code == 200, route
            yield f"GET {route}", paths(response.json())
    for name, writing in WRITINGS.items():
        if not writing.form:
            ids = owned_by(someone.user)
            known = {
                "(bot)": ids["_bot-registration/"],
                "(thread)": ids["threads/"],
                "(url)": f"{URL}/{uuid4()}",
            }
            output = {**writing.sent, "username": "@token:localhost"}
            sent = {key: output[key] for key in writing.sent}
            changed = Writing(writing.method, writing.path, sent, (), writing.kind)
            response = send(changed, someone.user, known, {})  # type: ignore[arg-type]
            yield f"{writing.method} ({name})", paths(response.json())


def test_every_answer_tells_what_is_listed_and_no_more() -> None:
    """What is added to an answer is looked at once by somebody: then it is added to keys.txt."""
    listed = {}
    for block in KEYS.read_text().strip().split("\n\n"):
        head, *names = block.splitlines()
        listed[head] = set(" ".join(names).split())
    found = dict(result())
    wrong = [
        f"{head}\n    {' '.join(sorted(names))}"
        for head, names in found.items()
        if listed.get(head) != names
    ]
    assert not wrong, "Not what tests/security/keys.txt says:\n\n" + "\n\n".join(wrong)
    assert found.keys() == listed.keys()
