"""What belongs to alice is to everybody else as if it were not there: by id, through what leads to it,
in lists, filters, pages and streams, and for whoever would change it."""

import json
import uuid
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import pytest
from django.db.models import Model

from agents.models import IdempotencyKey, Run
from chat.models import Message, Thread
from realm import tokens
from realm.models import BotCommand, BotRegistration, User
from tests import factories
from tests.realm.conftest import Client, command_of
from tests.security import access
from tests.security.routes import PARAMETER, address, routes
from tests.security.world import Visitor, owned_by, talk, visitor
from webhooks.models import Subscription

pytestmark = pytest.mark.django_db
CANARY = "canary"
SAFE = ("GET", "HEAD")
# What the realm server says 403 to, as its first clients were promised: the ids are random.
OWNED_BY_SOMEBODY_ELSE = ("_bot-registration/", "_bot-commands/", "_webhook-subscription/")
# All that is in a thread, but for the rows that only tell how far work has come.
HERS: tuple[type[Model], ...] = (
    Thread,
    Message,
    Run,
    BotRegistration,
    BotCommand,
    Subscription,
    IdempotencyKey,
)


@pytest.fixture(autouse=True)
def _hooks(settings: Any) -> None:
    settings.HOOKS_ALLOWED_HOSTS = ["hooks.example.org"]


@pytest.fixture
def alice() -> User:
    return factories.user("alice")


@pytest.fixture
def ids(alice: User) -> dict[str, Any]:
    """Of what is hers; whatever she has said or chosen has the canary in it."""
    found = owned_by(alice)
    Run.objects.update(correlation_id=CANARY, model=CANARY)
    Message.objects.update(correlation_id=CANARY, content=f"{CANARY} sings")
    Thread.objects.update(title=f"The {CANARY}", summary=CANARY)
    BotCommand.objects.update(command=CANARY)
    Subscription.objects.update(url=f"https://hooks.example.org/{CANARY}")
    return found


def nothing() -> dict[str, Any]:
    """Ids as hers are, of nothing at all."""
    thread, run, other = "thr_" + 24 * "0", "run_" + 24 * "0", str(uuid.uuid4())
    return {
        "threads/": thread,
        "runs/": run,
        "api/threads/": thread,
        "api/messages/": other,
        "api/runs/": run,
        "api/chat/threads/": thread,
        "api/chat/runs/": run,
    } | dict.fromkeys(OWNED_BY_SOMEBODY_ELSE, other)


STRANGERS = ("nobody", "token", "user", "superuser")


@pytest.fixture(params=STRANGERS)
def stranger(request: Any, settings: Any, ids: dict[str, Any]) -> Visitor:
    """Even a superuser has the admin for that, where it is written down. `nobody` comes where anybody
    may chat, for elsewhere they do not get this far."""
    settings.CHAT_ALLOW_ANONYMOUS = request.param == "nobody"
    return visitor(request.param)


@pytest.fixture
def bob(settings: Any, ids: dict[str, Any]) -> Visitor:
    """A colleague with a token and things of his own."""
    settings.CHAT_ALLOW_ANONYMOUS = False
    return visitor("token")


def hers() -> Any:
    """All rows that she has, as they are."""
    return [list(model._default_manager.order_by("pk").values()) for model in HERS]


def seen(response: Any, ids: dict[str, Any]) -> Any:
    """All that a client can tell, but for the ids that it named itself."""
    head = json.dumps(dict(response.headers))
    body = "" if response.streaming else response.content.decode()
    assert CANARY not in head + body
    for each in (*ids.values(), response["X-Request-ID"]):
        head, body = (text.replace(str(each), "(told)") for text in (head, body))
    return response.status_code, head, body


# By route, which methods do something there for who has what it leads to.
LEADING_TO_SOMETHING = [
    (route, method)
    for route, outcomes in access.table().items()
    if PARAMETER.search(route) and not route.startswith("admin/")
    for method in access.METHODS
    if "yes" in outcomes[method] and method != "OPTIONS"
]


def body_for(route: str, method: str) -> tuple[bytes, str]:
    if method in SAFE:
        return b"", "application/json"
    if method == "DELETE" or route.endswith(("/cancel", "/retry")):
        return b"", "application/json"  # these take no fields
    if route.startswith(("api", "_")):
        return json.dumps({"title": "taken", "archived": True}).encode(), "application/json"
    return b"title=taken&archived=true&content=taken", "application/x-www-form-urlencoded"


class TestById:
    def test_hers_cannot_be_told_from_nothing(self, stranger: Visitor, ids: dict[str, Any]) -> None:
        before, none = hers(), nothing()
        assert len(LEADING_TO_SOMETHING) > 50
        for route, method in LEADING_TO_SOMETHING:
            if route.startswith(OWNED_BY_SOMEBODY_ELSE):
                continue
            body, kind = body_for(route, method)
            asked, of_nothing = (
                seen(stranger.send(method, address(route, some), body, content_type=kind), some)
                for some in (ids, none)
            )
            # A token is for the API; to the page it is nobody.
            to_login = stranger.role == "token" and not route.startswith("api")
            assert asked[0] == (302 if to_login else 404), f"{method} {route}"
            assert asked == of_nothing, f"{method} {route}"
        assert hers() == before

    @pytest.mark.parametrize("start", OWNED_BY_SOMEBODY_ELSE)
    def test_the_realm_server_says_whose_it_is_not(
        self, bob: Visitor, ids: dict[str, Any], start: str
    ) -> None:
        before = hers()
        kind = {"_bot-commands/": "bot-command"}.get(start, start.strip("_/"))
        document = {"data": {"type": kind, "id": str(ids[start])}}
        for response in (
            bob.send("DELETE", f"/{start}{ids[start]}"),
            bob.client.send("DELETE", f"/{start.rstrip('/')}", document),
        ):
            assert seen(response, ids)[0] == 403
        assert hers() == before

    @pytest.mark.parametrize(
        "trick",
        [
            str.upper,
            str.title,
            lambda pk: pk + "/",
            lambda pk: "/" + pk,
            lambda pk: "./" + pk,
            lambda pk: "x/../" + pk,
            lambda pk: "%2e%2e/threads/" + pk,
            lambda pk: "%2F" + pk,
            lambda pk: pk + "%2F",
            lambda pk: pk + "%00",
            lambda pk: pk + "%0A",
            lambda pk: pk + "%20",
            lambda pk: pk + ";a=b",
            lambda pk: pk + ".json",
            lambda pk: pk + "%EF%BC%8E",
            lambda pk: quote(pk.translate({ord("0") + n: 0xFF10 + n for n in range(10)})),
            lambda pk: "".join(f"%{ord(c):02x}" for c in pk),
            lambda pk: "".join(f"%25{ord(c):02x}" for c in pk),
            lambda pk: pk[:-1] + "%",
            lambda pk: pk[:-1] + "_",
            lambda pk: "%27%20OR%201=1--",
            lambda pk: "*",
        ],
    )
    def test_nor_by_another_name_for_it(
        self, bob: Visitor, ids: dict[str, Any], trick: Any
    ) -> None:
        for start in ("api/threads/", "api/messages/", "api/runs/", "api/chat/runs/"):
            response = bob.send("GET", f"/{start}{trick(str(ids[start]))}")
            assert seen(response, ids)[0] == 404, response.content

    def test_two_proofs_are_not_added_up(self, bob: Visitor, alice: User, ids: Any) -> None:
        """A token says who it is, whatever session comes with it; a bad one is not made up for."""
        browser = Client()
        browser.force_login(alice)
        path = f"/api/runs/{ids['api/runs/']}"
        his = f"Bearer {tokens.issue('@token:localhost')}"

        assert browser.get(path).status_code == 200
        assert browser.get(path, HTTP_AUTHORIZATION=his).status_code == 404
        assert browser.get(path, HTTP_AUTHORIZATION="Bearer nonsense").status_code == 401
        assert browser.get(path, HTTP_X_CHAT_USER=str(bob.user.pk)).status_code == 401  # type: ignore[union-attr]


def lists(ids: dict[str, Any]) -> Iterator[str]:
    """Every list, asked for what is hers in all ways that it can be asked."""
    thread, run, message = (ids[f"api/{kind}/"] for kind in ("threads", "runs", "messages"))
    about = [
        f"filter[thread]={thread}",
        f"filter[correlationId]={CANARY}",
        f"filter[thread]={thread}&filter[correlationId]={CANARY}",
    ]
    yield from ("/api/threads", "/api/messages", "/api/runs", "/api/chat/threads")
    for query in (*about, "sort=-createdAt", "sort=createdAt"):
        yield f"/api/runs?{query}&include=thread.messages,message,answer,mergedInto"
        yield f"/api/messages?{query}&include=thread.runs,run.answer"
    yield f"/api/runs?filter[model]={CANARY}"
    yield "/api/threads?include=messages.run.answer,runs.mergedInto&sort=updatedAt"
    # A place is no more than a moment and an id, which nobody looks up.
    yield f"/api/runs?page[before]=0.{run}"
    yield f"/api/runs?page[after]=9999999999999999.{run}"
    yield f"/api/messages?page[before]=0.{message}"
    yield f"/api/threads?page[after]=9999999999999999.{thread}"
    yield "/api/chat/threads?archived=true&limit=200"
    yield from ("/_bot-registrations", "/_bot-commands", "/_webhook-subscriptions")
    yield from ("/", "/?archived")


class TestLists:
    def test_a_list_is_as_if_hers_were_not_there(
        self, stranger: Visitor, ids: dict[str, Any], alice: User
    ) -> None:
        """Also what it counts, and where it leads."""
        some = list(lists(ids))

        def all_of_them() -> list[Any]:
            return [
                seen(stranger.send(method, path), stranger.ids)[::2]
                for path in some
                for method in SAFE
                if path != "/" and "?archived" not in path  # pages: they have fresh keys
            ]

        pages = [stranger.send("GET", path) for path in ("/", "/?archived")]
        with_hers = all_of_them()
        alice.delete()

        assert all(CANARY not in page.content.decode() for page in pages)
        assert with_hers == all_of_them()
        assert any(status == 200 for status, _ in with_hers)

    @pytest.mark.parametrize(
        "path",
        [
            "/api/chat/threads?before={api/chat/threads/}",
            "/?older={threads/}",
            "/api/chat/threads/{own}/messages?before={api/messages/}",
        ],
    )
    def test_hers_is_no_place_to_go_on_from(
        self, stranger: Visitor, ids: dict[str, Any], path: str
    ) -> None:
        own = stranger.ids["threads/"]
        here, nowhere = (
            seen(stranger.send("GET", path.format(own=own, **some)), some)
            for some in (ids, nothing())
        )
        to_login = stranger.role == "token" and not path.startswith("/api")
        assert here[0] == (302 if to_login else 404)
        assert here == nowhere

    def test_the_commands_of_her_bot_are_not_told(self, bob: Visitor, ids: dict[str, Any]) -> None:
        response = bob.send("GET", f"/_bot-commands?botId={ids['_bot-registration/']}")
        assert seen(response, ids)[0] == 403


class TestAsking:
    """Nothing is added to what is hers."""

    def test_in_her_thread(self, stranger: Visitor, ids: dict[str, Any]) -> None:
        before, thread = hers(), ids["threads/"]
        linkage = {"data": {"type": "threads", "id": thread}}
        document = {
            "data": {
                "type": "messages",
                "attributes": {"content": "x"},
                "relationships": {"thread": linkage},
            }
        }
        plain = {"content": "x", "threadId": thread}
        for response in (
            stranger.client.send("POST", "/api/messages", document),
            *(
                stranger.client.send("POST", "/api/chat/messages", plain | extra)
                for extra in ({}, *({"whenBusy": way} for way in ("merge", "interrupt", "reject")))
            ),
            stranger.client.send("POST", "/api/chat/messages", plain, HTTP_PREFER="wait=1"),
            stranger.client.send(
                "POST", "/api/chat/messages", plain, HTTP_ACCEPT="text/event-stream"
            ),
        ):
            assert seen(response, ids)[0] == 404
        assert hers() == before

    def test_by_her_idempotency_key(self, bob: Visitor, alice: User) -> None:
        key = {"HTTP_IDEMPOTENCY_KEY": "order-1"}
        client = Client()
        client.credentials(HTTP_AUTHORIZATION=f"Bearer {tokens.issue('@alice:localhost')}")
        first = client.send("POST", "/api/chat/messages", {"content": "x"}, **key).json()

        his = bob.client.send("POST", "/api/chat/messages", {"content": "x"}, **key)
        other = bob.client.send("POST", "/api/chat/messages", {"content": "y"}, **key)

        assert "Idempotency-Replayed" not in his.headers
        assert his.json()["runId"] != first["runId"]
        assert Run.objects.get(pk=his.json()["runId"]).thread.owner == bob.user
        assert other.status_code == 422  # because of his own

    @pytest.mark.parametrize("path", ["/api/chat/messages", "/api/messages"])
    def test_by_the_key_of_another_network_without_an_account(
        self, settings: Any, path: str
    ) -> None:
        """Anonymous callers are told apart by the network that they ask from, as their limits do."""
        settings.CHAT_ALLOW_ANONYMOUS = True
        document: dict[str, Any] = {"content": "x"}
        if path == "/api/messages":
            document = {"data": {"type": "messages", "attributes": document}}

        def ask(address: str) -> Any:
            return Client().send(
                "POST", path, document, REMOTE_ADDR=address, HTTP_IDEMPOTENCY_KEY="order-1"
            )

        hers, his, again = ask("203.0.113.7"), ask("203.0.113.8"), ask("203.0.113.7")
        near, nearby = ask("2001:db8:1:2::1"), ask("2001:db8:1:2::9")
        assert "Idempotency-Replayed" not in his.headers
        assert his.json() != hers.json()
        assert again.headers["Idempotency-Replayed"] == "true"
        # With IPv6 one caller has a whole network.
        assert "Idempotency-Replayed" not in near.headers
        assert nearby.headers["Idempotency-Replayed"] == "true"
        assert Run.objects.filter(message__content="x").count() == 3

    def test_through_her_bot(self, bob: Visitor, ids: dict[str, Any]) -> None:
        before, bot = hers(), ids["_bot-registration/"]
        webhook = {
            "data": {
                "type": "webhook-subscription",
                "attributes": {"url": "https://hooks.example.org/", "botId": bot},
            }
        }
        for path, document in (
            ("/_bot-commands", command_of(bot)),
            ("/_webhook-subscription", webhook),
        ):
            assert seen(bob.client.send("POST", path, document), ids)[0] == 403
        assert hers() == before


def test_what_is_nobodys_is_closed_where_nobody_may_chat(bob: Visitor) -> None:
    """The threads of those who came before CHAT_ALLOW_ANONYMOUS was turned off."""
    free = talk(None)
    for start in ("/api/chat/threads/", "/api/threads/", "/threads/"):
        assert bob.send("GET", f"{start}{free.thread_id}").status_code in (302, 404)
    assert bob.send("GET", "/api/threads").json()["data"][0]["id"] == bob.ids["api/threads/"]


def test_every_address_with_an_id_is_tried() -> None:
    leading = {route for route in routes() if PARAMETER.search(route)}
    tried = {route for route, _ in LEADING_TO_SOMETHING}
    assert tried == {route for route in leading if not route.startswith("admin/")}
