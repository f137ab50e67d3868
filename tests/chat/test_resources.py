"""`/api/threads`, `/api/messages`, `/api/runs` in JSON:API: read, followed, and asked through."""

from typing import Any

import pytest
from django.db import connection
from django.test.utils import CaptureQueriesContext

from agents.models import IdempotencyKey, Run
from agents.runs import execution as runs
from chat.models import Message, Thread
from realm.models import User
from tests import factories
from tests.plans import explain_sql
from tests.realm.conftest import JSON_API, Client, client_of, only_error

pytestmark = pytest.mark.django_db


@pytest.fixture
def alice() -> User:
    """Owns what there is."""
    return factories.user("alice")


@pytest.fixture
def client(alice: User, settings: Any) -> Client:
    settings.CHAT_ALLOW_ANONYMOUS = False
    return client_of(alice)


def talk(owner: User | None, turns: int = 1) -> Thread:
    return factories.conversation(turns, thread=Thread.objects.create(owner=owner))


def document_of(response: Any) -> Any:
    assert response.status_code == 200, response.content
    assert response.headers["Content-Type"] == JSON_API
    return response.json()


def ids(document: Any) -> list[str]:
    return [each["id"] for each in document["data"]]


def included(document: Any) -> set[tuple[str, str]]:
    return {(each["type"], each["id"]) for each in document["included"]}


def question(content: str = "Hello", thread: str | None = None, **attributes: Any) -> Any:
    resource: dict[str, Any] = {
        "type": "messages",
        "attributes": {"content": content} | attributes,
    }
    if thread:
        linkage = {"type": "threads", "id": thread}
        resource["relationships"] = {"thread": {"data": linkage}}
    return {"data": resource}


class TestResources:
    def test_run_matches_plain_json(self, client: Client, alice: User) -> None:
        asked = factories.ask(owner=alice, correlation_id="c-1")
        runs.execute(asked.pk)
        plain = client.get(f"/api/chat/runs/{asked.pk}").json()["run"]

        run = document_of(client.get(f"/api/runs/{asked.pk}"))["data"]

        assert (run["type"], run["id"]) == ("runs", asked.pk)
        assert run["links"] == {"self": f"/api/runs/{asked.pk}"}
        for name in plain.keys() - {"id", "threadId"}:
            assert run["attributes"][name] == plain[name], name
        assert run["attributes"]["output"] == "Handled prompt: Hello"
        assert run["attributes"]["safeError"] is None
        assert run["relationships"]["thread"]["data"] == {
            "type": "threads",
            "id": asked.thread_id,
        }

    def test_message_matches_plain_json(self, client: Client, alice: User) -> None:
        thread = talk(alice)
        plain = client.get(f"/api/chat/threads/{thread.pk}/messages").json()["messages"]

        messages = document_of(client.get(f"/api/threads/{thread.pk}/messages"))["data"]

        run = {"type": "runs", "id": Run.objects.get().pk}
        for old, new in zip(plain, messages, strict=True):
            assert new["id"] == old["id"]
            for name in old.keys() - {"id", "threadId"}:
                assert new["attributes"][name] == old[name], name
            # The question's and the answer's.
            assert new["relationships"]["run"]["data"] == run

    def test_every_link_works(self, client: Client, alice: User) -> None:
        talk(alice)
        factories.ask(owner=alice)  # without an answer
        seen: dict[str, Any] = {}
        waiting = ["/api/threads", "/api/messages", "/api/runs"]
        while waiting:
            at = waiting.pop()
            if at not in seen:
                seen[at] = document_of(client.get(at))
                waiting += links_in(seen[at])

        assert len(seen) == 3 + 2 * 5 + 3 * 5 + 2 * 9
        for at, document in seen.items():
            if "/relationships/" in at:
                assert document["links"]["self"] == at
                related = seen[document["links"]["related"]]["data"]
                some = related if isinstance(related, list) else [related]
                identifiers = [each and {"type": each["type"], "id": each["id"]} for each in some]
                one = identifiers if isinstance(related, list) else identifiers[0]
                assert document["data"] == one

    def test_missing_answer(self, client: Client, alice: User) -> None:
        run = factories.ask(owner=alice)

        assert document_of(client.get(f"/api/runs/{run.pk}/answer")) == {"data": None}
        assert (
            document_of(client.get(f"/api/runs/{run.pk}"))["data"]["attributes"]["output"] is None
        )

    @pytest.mark.parametrize("accept", ["application/json", "*/*", ""])
    def test_other_names_of_the_media_type(self, client: Client, accept: str) -> None:
        response = client.get("/api/runs", headers={"accept": accept})
        assert response.status_code == 200
        assert response.json() == {"data": [], "links": {"prev": None, "next": None}}

    def test_other_methods_are_rejected(self, client: Client, alice: User) -> None:
        thread = talk(alice)
        for method in ("POST", "PATCH", "PUT", "DELETE"):
            for at in (f"/api/threads/{thread.pk}", f"/api/threads/{thread.pk}/messages"):
                only_error(client.send(method, at, question()), 405)
        only_error(client.send("POST", "/api/threads", question()), 405)
        only_error(client.send("DELETE", f"/api/threads/{thread.pk}/relationships/runs", None), 405)
        assert Message.objects.count() == 2

    @pytest.mark.parametrize(
        "path",
        [
            "/api/threads/a/b",
            "/api/messages/1",
            "/api/runs/%00",
            "/api/runs/a/b/c",
        ],
    )
    def test_unknown_paths(self, client: Client, path: str) -> None:
        assert only_error(client.get(path), 404)["code"] == "not_found"

    def test_disallowed_host(self, client: Client) -> None:
        only_error(client.get("/api/runs", HTTP_HOST="evil.example"), 400)


def links_in(node: Any) -> list[str]:
    if isinstance(node, list):
        return [link for each in node for link in links_in(each)]
    if not isinstance(node, dict):
        return []
    own = [link for link in node.get("links", {}).values() if link]
    return own + [link for each in node.values() for link in links_in(each)]


class TestInclude:
    def test_three_steps(self, client: Client, alice: User) -> None:
        thread = talk(alice, turns=2)

        document = document_of(client.get(f"/api/threads/{thread.pk}?include=messages.run.answer"))

        messages = [("messages", str(pk)) for pk in thread.messages.values_list("pk", flat=True)]
        runs = [("runs", pk) for pk in thread.runs.values_list("pk", flat=True)]
        assert included(document) == {*messages, *runs}
        linkage = document["data"]["relationships"]["messages"]["data"]
        assert [(each["type"], each["id"]) for each in linkage] == messages

    def test_resource_included_twice_is_returned_once(self, client: Client, alice: User) -> None:
        thread = talk(alice)

        document = document_of(client.get("/api/runs?include=thread,message.thread.messages"))

        assert included(document) == {
            ("threads", thread.pk),
            *(("messages", str(pk)) for pk in thread.messages.values_list("pk", flat=True)),
        }
        [only] = [each for each in document["included"] if each["type"] == "threads"]
        assert len(only["relationships"]["messages"]["data"]) == 2

    def test_primary_data_is_not_included_again(self, client: Client, alice: User) -> None:
        talk(alice)

        document = document_of(client.get("/api/messages?include=thread.messages"))

        assert [each["type"] for each in document["included"]] == ["threads"]

    def test_newest_turns_of_a_long_thread_are_included(self, client: Client, alice: User) -> None:
        thread = talk(alice, turns=40)

        document = document_of(client.get("/api/threads?include=messages"))

        newest = list(thread.messages.filter(position__gte=30).values_list("pk", flat=True))
        linkage = document["data"][0]["relationships"]["messages"]["data"]
        assert [each["id"] for each in linkage] == [str(pk) for pk in newest]
        assert included(document) == {("messages", str(pk)) for pk in newest}

    def test_include_of_a_new_message(self, client: Client) -> None:
        response = client.send("POST", "/api/messages?include=run,thread", question())

        assert {each["type"] for each in response.json()["included"]} == {"runs", "threads"}

    @pytest.mark.parametrize(
        "path",
        [
            "nope",
            "messages.nope",
            "messages.run.answer.thread",
            "messages..run",
            " messages",
            "%00",
        ],
    )
    def test_unknown_include_paths(self, client: Client, path: str) -> None:
        error = only_error(client.get(f"/api/threads?include={path}"), 400)
        assert error["source"] == {"parameter": "include"}

    @pytest.mark.parametrize(
        "at",
        [
            "/api/threads?include=messages.run.answer,runs.answer.thread",
            "/api/messages?include=thread.runs,run.answer",
            "/api/runs?include=thread.messages,message,answer",
            "/api/runs",
        ],
    )
    def test_queries_do_not_grow_with_rows(self, client: Client, alice: User, at: str) -> None:
        def queries(rows: int) -> int:
            while Thread.objects.count() < rows:
                talk(alice)
            with CaptureQueriesContext(
                connection,
            ) as asked:
                document_of(client.get(at))
            return len(asked)

        assert queries(3) == queries(30)

    def test_a_list_may_be_given_as_repeated_parameters(self, client: Client, alice: User) -> None:
        talk(alice)
        at = "/api/messages?{}&fields[messages]=thread,run&filter[role]=user,assistant"
        together = document_of(client.get(at.format("include=thread,run")))

        assert len(together["included"]) == 2
        assert document_of(client.get(at.format("include=thread&include=run"))) == together
        at = at.replace("&fields[messages]=thread,run", "&fields[messages]=thread")
        at = at.replace("role]=user,assistant", "role]=user&filter[role]=assistant")
        at += "&fields[messages]=run"
        repeated = document_of(client.get(at.format("include=thread&include=run")))
        assert repeated["data"] == together["data"]
        only_error(client.get("/api/messages?sort=position&sort=position"), 400)


class TestSparseFields:
    def test_sparse_fieldsets(self, client: Client, alice: User) -> None:
        talk(alice)
        query = "include=thread&fields[messages]=correlationId,thread&fields[threads]="

        document = document_of(client.get(f"/api/messages?{query}"))

        for message in document["data"]:
            assert set(message["attributes"]) == {"correlationId"}
            assert set(message["relationships"]) == {"thread"}
        [thread] = document["included"]
        assert set(thread) == {"type", "id", "links"}

    @pytest.mark.parametrize(
        "query",
        ["fields[runs]=nope", "fields[runs]=lease_expires_at", "fields[users]=id", "fields=x"],
    )
    def test_unknown_fields(self, client: Client, query: str) -> None:
        error = only_error(client.get(f"/api/runs?{query}"), 400)
        assert error["source"] == {"parameter": query.partition("=")[0]}


class TestLists:
    def test_pages_to_the_end_and_back(self, client: Client, alice: User) -> None:
        talk(alice, turns=4)
        at = "/api/messages?page[size]=3&sort=position&include=thread"
        pages = [document_of(client.get(at))]
        while following := pages[-1]["links"]["next"]:
            pages.append(document_of(client.get(following)))
        assert [len(page["data"]) for page in pages] == [3, 3, 2]
        assert all(page["included"] for page in pages)
        assert [each["attributes"]["position"] for page in pages for each in page["data"]] == list(
            range(8)
        )

        back = [pages[-1]]
        while previous := back[-1]["links"]["prev"]:
            back.append(document_of(client.get(previous)))
        assert [ids(page) for page in back] == [ids(page) for page in reversed(pages)]

    def test_new_rows_shift_no_page(self, client: Client, alice: User) -> None:
        talk(alice, turns=3)
        first = document_of(client.get("/api/runs?page[size]=2"))
        talk(alice)

        rest = document_of(client.get(first["links"]["next"]))

        assert len({*ids(first), *ids(rest)}) == 3

    def test_rows_of_the_same_time_are_not_lost_between_pages(
        self, client: Client, alice: User
    ) -> None:
        talk(alice, turns=5)
        moment = Run.objects.latest("created_at").created_at
        Run.objects.update(created_at=moment)

        for sort in ("createdAt", "-createdAt"):
            found, following = [], f"/api/runs?page[size]=2&sort={sort}"
            while following:
                page = document_of(client.get(following))
                found += ids(page)
                following = page["links"]["next"]
            assert sorted(found) == sorted(Run.objects.values_list("pk", flat=True))

    def test_default_order_is_newest_first(self, client: Client, alice: User) -> None:
        talk(alice, turns=3)
        newest = list(Run.objects.order_by("-created_at").values_list("pk", flat=True))

        assert ids(document_of(client.get("/api/runs"))) == newest
        assert ids(document_of(client.get("/api/runs?sort=-createdAt"))) == newest
        assert ids(document_of(client.get("/api/runs?sort=createdAt"))) == newest[::-1]

    def test_filters(self, client: Client, alice: User) -> None:
        thread = talk(alice)
        waiting = factories.ask(owner=alice, correlation_id="c-1", model="gpt-9")
        done = thread.runs.get()

        for query, expected in [
            ("filter[status]=queued", [waiting.pk]),
            ("filter[status]=queued,completed", [waiting.pk, done.pk]),
            ("filter[status]=failed", []),
            ("filter[model]=gpt-9", [waiting.pk]),
            ("filter[correlationId]=c-1&filter[source]=http", [waiting.pk]),
            (f"filter[thread]={thread.pk}", [done.pk]),
            (f"filter[thread]={thread.pk}&filter[status]=queued", []),
        ]:
            assert ids(document_of(client.get(f"/api/runs?{query}"))) == expected, query

    def test_page_links_keep_the_query(self, client: Client, alice: User) -> None:
        talk(alice, turns=2)

        at = "/api/messages?filter[role]=assistant&page[size]=1&fields[messages]=role"
        second = document_of(client.get(document_of(client.get(at))["links"]["next"]))

        assert [each["attributes"] for each in second["data"]] == [{"role": "assistant"}]

    @pytest.mark.parametrize(
        ("query", "parameter"),
        [
            ("filter[nope]=1", "filter[nope]"),
            ("filter[thread__owner]=1", "filter[thread__owner]"),
            ("filter[status]=dead", "filter[status]"),
            ("filter[status]=", "filter[status]"),
            ("filter[model]=%00", "filter[model]"),
            ("filter[model]=a&filter[model]=b", "filter[model]"),
            ("filter=x", "filter"),
            ("sort=leaseExpiresAt", "sort"),
            ("sort=createdAt,position", "sort"),
            ("sort=--createdAt", "sort"),
            ("sort=", "sort"),
            ("page[size]=0", "page[size]"),
            ("page[size]=101", "page[size]"),
            ("page[size]=-1", "page[size]"),
            ("page[size]=²", "page[size]"),
            ("page[number]=2", "page[number]"),
            ("page[offset]=2", "page[offset]"),
            ("page[after]=", "page[after]"),
            ("page[after]=nope", "page[after]"),
            ("page[before]=1.%00", "page[before]"),
            ("search=x", "search"),
        ],
    )
    def test_invalid_queries(self, client: Client, query: str, parameter: str) -> None:
        error = only_error(client.get(f"/api/runs?{query}"), 400)
        assert error["source"] == {"parameter": parameter}

    @pytest.mark.parametrize(
        "at",
        [
            "/api/messages?page[after]=1.nope",
            "/api/runs/run_1?sort=createdAt",
            "/api/messages?filter[thread]=%FF%00",
        ],
    )
    def test_cursors_of_other_lists_are_rejected(self, client: Client, at: str) -> None:
        assert only_error(client.get(at), 400)["source"]["parameter"]

    def test_a_page_deep_in_a_long_thread_is_read_along_an_index(
        self, client: Client, alice: User
    ) -> None:
        thread = talk(alice, turns=300)
        at = f"/api/threads/{thread.pk}/messages"
        following = document_of(client.get(f"{at}?page[size]=100"))["links"]["next"]

        with CaptureQueriesContext(connection) as asked:
            document_of(client.get(following))

        sqlite = connection.vendor == "sqlite"
        index = "thread_id=? AND position>" if sqlite else "message_position_is_unique"
        page = next(each["sql"] for each in asked if "LIMIT 101" in each["sql"])
        assert index in explain_sql(page)


class TestOthers:
    """What is alice's is document_of to nobody else: see tests/security/test_bola.py."""

    def test_authentication_is_required(self, client: Client, alice: User) -> None:
        anonymous = Client()
        for at in ("/api/threads", "/api/messages", "/api/runs", "/api/runs/run_1"):
            response = anonymous.get(at)
            assert only_error(response, 401)["code"] == "not_authenticated"
            assert response.headers["WWW-Authenticate"].startswith("Bearer")
        only_error(anonymous.send("POST", "/api/messages", question()), 401)

    def test_anonymous_callers_see_anonymous_threads(self, alice: User, settings: Any) -> None:
        settings.CHAT_ALLOW_ANONYMOUS = True
        talk(alice)
        free = talk(None)
        assert ids(document_of(Client().get("/api/threads"))) == [free.pk]


class TestAsking:
    def test_post_creates_a_message_with_a_run(self, client: Client, alice: User) -> None:
        response = client.send("POST", "/api/messages", question(" Hello ", correlationId="c-1"))

        assert response.status_code == 201
        message = response.json()["data"]
        run = Run.objects.get()
        assert response.headers["Location"] == f"/api/messages/{message['id']}"
        assert message["id"] == str(run.message_id)
        assert message["attributes"]["content"] == "Hello"
        assert message["relationships"]["run"]["data"] == {"type": "runs", "id": run.pk}
        assert (run.source, run.correlation_id, run.thread.owner) == ("http", "c-1", alice)
        assert document_of(client.get(response.headers["Location"])) == {"data": message}

    def test_post_to_an_own_or_a_new_thread(self, client: Client, alice: User) -> None:
        thread = talk(alice)
        for name in (thread.pk, "my-thread"):
            response = client.send("POST", "/api/messages", question("And?", thread=name))
            assert response.status_code == 201
            assert response.json()["data"]["relationships"]["thread"]["data"]["id"] == name
        assert thread.messages.count() == 3

    def test_busy_policies(self, client: Client) -> None:
        client.send("POST", "/api/messages", question(thread="t"))

        rejected = client.send("POST", "/api/messages", question(thread="t", whenBusy="reject"))
        assert only_error(rejected, 409)["code"] == "thread_is_busy"

        merging = question(thread="t", whenBusy="merge", deadlineSeconds=60)
        merged = client.send("POST", "/api/messages?include=run", merging).json()
        run = merged["included"][0]
        assert run["attributes"]["deadlineAt"]
        earlier = Run.objects.get(merged_into__isnull=False)
        leads = document_of(client.get(f"/api/runs/{earlier.pk}/mergedInto"))
        assert leads["data"]["id"] == run["id"]

    def test_repeat_with_the_same_key(self, client: Client) -> None:
        def asked(document: Any) -> Any:
            return client.send(
                "POST", "/api/messages", document, headers={"Idempotency-Key": "order-1"}
            )

        first, again = asked(question()), asked(question())
        assert again.status_code == 201
        assert again.json() == first.json()
        assert again.headers["Idempotency-Replayed"] == "true"
        assert "Idempotency-Replayed" not in first.headers
        assert Run.objects.count() == 1

        error = only_error(asked(question("Other")), 422)
        assert error["code"] == "idempotency_key_reused"
        assert error["source"] == {"header": "Idempotency-Key"}

    def test_repeat_after_deletion(self, client: Client) -> None:
        key = {"Idempotency-Key": "order-1"}
        client.send("POST", "/api/messages", question(), headers=key)
        Thread.objects.all().delete()

        if IdempotencyKey.objects.exists():
            only_error(client.send("POST", "/api/messages", question(), headers=key), 404)

    def test_the_key_is_the_same_in_plain_json(self, client: Client) -> None:
        key = {"Idempotency-Key": "order-1"}
        plain = client.raw(
            "POST", "/api/chat/messages", b'{"content": "Hello"}', headers=key
        ).json()

        message = client.send("POST", "/api/messages", question(), headers=key).json()["data"]

        assert message["id"] == plain["messageId"]

    @pytest.mark.parametrize(
        ("document", "status", "source"),
        [
            (question(""), 400, "/data/attributes/content"),
            (question("  \n"), 400, "/data/attributes/content"),
            (question("a\0b"), 400, "/data/attributes/content"),
            (question(7), 400, "/data/attributes/content"),  # type: ignore[arg-type]
            ({"data": {"type": "messages"}}, 400, "/data/attributes/content"),
            (question(model="x" * 101), 400, "/data/attributes/model"),
            (question(model=""), 400, "/data/attributes/model"),
            (question(correlationId="x" * 201), 400, "/data/attributes/correlationId"),
            (question(whenBusy="wait"), 400, "/data/attributes/whenBusy"),
            (question(deadlineSeconds=0), 400, "/data/attributes/deadlineSeconds"),
            (question(deadlineSeconds="1"), 400, "/data/attributes/deadlineSeconds"),
            (question(correlationId=[]), 400, "/data/attributes/correlationId"),
            (question(thread="a/b"), 400, "/data/relationships/thread/data/id"),
            (question(thread="x" * 65), 400, "/data/relationships/thread/data/id"),
            ({"data": {"type": "runs"}}, 409, "/data/type"),
            ({"data": question()["data"] | {"id": "x"}}, 403, "/data/id"),
        ],
    )
    def test_invalid_messages(
        self, client: Client, document: Any, status: int, source: str
    ) -> None:
        error = only_error(client.send("POST", "/api/messages", document), status)

        assert error["source"] == {"pointer": source}
        assert not Message.objects.exists()

    @pytest.mark.parametrize(
        ("linkage", "status", "where"),
        [
            ({"type": "messages", "id": "x"}, 409, "/data/relationships/thread/data/type"),
            ([], 400, "/data/relationships/thread/data"),
            ([{"type": "threads", "id": "x"}], 400, "/data/relationships/thread/data"),
            ([None], 400, "/data/relationships/thread"),
            ("x", 400, "/data/relationships/thread"),
            (7, 400, "/data/relationships/thread"),
            ({"type": "threads"}, 400, "/data/relationships/thread"),
            ({"type": "threads", "id": 7}, 400, "/data/relationships/thread"),
        ],
    )
    def test_invalid_threads(self, client: Client, linkage: Any, status: int, where: str) -> None:
        document = question()
        document["data"]["relationships"] = {"thread": {"data": linkage}}

        error = only_error(client.send("POST", "/api/messages", document), status)

        assert error["source"] == {"pointer": where}
        assert not Message.objects.exists()

    @pytest.mark.parametrize("thread", [{}, {"type": "threads", "id": 5}, {"id": "x"}])
    def test_a_thread_among_the_attributes(self, client: Client, thread: Any) -> None:
        only_error(client.send("POST", "/api/messages", question() | _attributes(thread)), 400)
        assert not Message.objects.exists()

    @pytest.mark.parametrize("key", ["", "x" * 256, "a\tb"])
    def test_invalid_keys(self, client: Client, key: str) -> None:
        response = client.send(
            "POST", "/api/messages", question(), headers={"Idempotency-Key": key}
        )
        assert only_error(response, 400)["source"] == {"header": "Idempotency-Key"}

    def test_session_requires_csrf_token(self, alice: User) -> None:
        browser = Client(enforce_csrf_checks=True)
        browser.force_login(alice)

        only_error(browser.send("POST", "/api/messages", question()), 403)

        assert not Message.objects.exists()


def _attributes(thread: Any) -> dict[str, Any]:
    return {"data": {"type": "messages", "attributes": {"content": "x", "thread": thread}}}
