"""Webhooks of a realm user, over JSON:API."""

import uuid
from typing import Any

import pytest
from django.db import IntegrityError, transaction

from realm.models import User
from tests import factories
from tests.botrunner import scenes as matrix
from tests.realm.conftest import client_of, only_error
from tests.webhooks import scenes
from webhooks import models
from webhooks.models import Subscription

pytestmark = pytest.mark.django_db
PATH = "/_webhook-subscription"


@pytest.fixture
def alice() -> User:
    return factories.user("alice")


def document(**attributes: Any) -> dict[str, Any]:
    return {
        "data": {"type": "webhook-subscription", "attributes": {"url": scenes.URL} | attributes}
    }


def post(user: User, **attributes: Any) -> Any:
    return client_of(user).send("POST", PATH, document(**attributes))


def test_a_user_subscribes_and_is_given_the_secret_once(alice: User) -> None:
    response = post(alice)

    assert response.status_code == 201, response.content
    made = Subscription.objects.get()
    data = response.json()["data"]
    created = data["attributes"].pop("createdAt")
    assert data == {
        "type": "webhook-subscription",
        "id": str(made.pk),
        "attributes": {
            "url": scenes.URL,
            "botId": None,
            "events": ["run.completed", "run.failed", "run.cancelled"],
            "enabled": True,
            "disabledReason": "",
            "secret": made.secret,
        },
    }
    assert made.owner == alice
    assert response.headers["Cache-Control"] == "no-store"

    [listed] = client_of(alice).get("/_webhook-subscriptions").json()["data"]
    assert listed["attributes"] == {
        key: value
        for key, value in (data["attributes"] | {"createdAt": created}).items()
        if key != "secret"
    }


def test_to_some_outcomes_of_one_bot(alice: User) -> None:
    bot = matrix.command().registration
    assert bot.user == alice
    response = post(alice, botId=str(bot.pk), events=["run.failed"])

    assert response.status_code == 201
    made = Subscription.objects.get()
    assert (made.registration, made.events) == (bot, ["run.failed"])


@pytest.mark.parametrize(
    ("attributes", "pointer"),
    [
        ({"url": "https://other.example.org/"}, "/data/attributes/url"),
        ({"url": "http://hooks.example.org/"}, "/data/attributes/url"),
        ({"url": "https://hooks.example.org/\x00"}, "/data/attributes/url"),
        ({"url": None}, "/data/attributes/url"),
        ({"url": 1}, "/data/attributes/url"),
        ({"events": []}, "/data/attributes/events"),
        ({"events": ["run.started"]}, "/data/attributes/events/0"),
        ({"events": "run.failed"}, "/data/attributes/events"),
        ({"botId": "x"}, "/data/attributes/botId"),
    ],
)
def test_what_cannot_be_is_refused(alice: User, attributes: dict[str, Any], pointer: str) -> None:
    error = only_error(post(alice, **attributes), 400)

    assert error["source"] == {"pointer": pointer}
    assert not Subscription.objects.exists()


def test_nobody_subscribes_to_the_bot_of_another(alice: User) -> None:
    bot = matrix.command(matrix.BOB).registration
    only_error(post(alice, botId=str(bot.pk)), 403)
    only_error(post(alice, botId=str(uuid.uuid4())), 404)
    assert not Subscription.objects.exists()


def test_there_is_an_end_to_how_many(alice: User, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "MAX_EACH", 2)
    answers = [post(alice, url=f"{scenes.URL}/{number}") for number in range(3)]
    assert [answer.status_code for answer in answers] == [201, 201, 400]
    assert "Delete one first." in only_error(answers[-1], 400)["detail"]
    assert post(factories.user("bob")).status_code == 201


def test_there_is_an_end_to_how_many_lead_to_one_host(
    alice: User, monkeypatch: pytest.MonkeyPatch, settings: Any
) -> None:
    settings.HOOKS_ALLOWED_HOSTS = ["*.example.org"]
    monkeypatch.setattr(models, "MAX_EACH_HOST", 2)
    answers = [post(alice, url=f"{scenes.URL}/{number}") for number in range(3)]
    error = only_error(answers[-1], 400)
    assert error["source"] == {"pointer": "/data/attributes/url"}
    assert "2 webhooks to hooks.example.org" in error["detail"]
    assert post(alice, url="https://other.example.org/").status_code == 201


@pytest.mark.parametrize(
    "url",
    [
        "https://hooks.example.org/outcomes",
        "HTTPS://Hooks.Example.ORG/outcomes",
        "https://hooks.example.org:443/outcomes",
        "https://hooks.example.org:/outcomes",
        "https://hooks.example.org./outcomes",
        "https://hooks.example.org/outcomes#part",
        "https://hooks.example.org/outcomes?",
        "https://hooks.example.org/%6Futcomes",
    ],
)
def test_the_same_webhook_is_added_once_however_it_is_written(
    alice: User, url: str, settings: Any
) -> None:
    settings.HOOKS_ALLOWED_HOSTS = ["hooks.example.org", "hooks.example.org."]
    made = post(alice)
    assert made.status_code == 201

    error = only_error(post(alice, url=url, events=["run.failed"]), 409)

    assert error["source"] == {"pointer": "/data/attributes/url"}
    assert made.json()["data"]["id"] in error["detail"]
    assert Subscription.objects.get().url == scenes.URL


def test_the_same_url_is_good_for_another_bot_or_owner_and_another_path_for_the_same(
    alice: User,
) -> None:
    bot = matrix.command().registration
    answers = [
        post(alice),
        post(alice, botId=str(bot.pk)),
        post(factories.user("bob")),
        post(alice, url=f"{scenes.URL}/Other?a=%2f"),
    ]
    assert [answer.status_code for answer in answers] == [201] * 4
    assert Subscription.objects.filter(url=f"{scenes.URL}/Other?a=%2F").exists()
    only_error(post(alice, botId=str(bot.pk)), 409)


def test_the_database_takes_no_webhook_twice(alice: User) -> None:
    bot = matrix.command().registration
    for columns in ({}, {"registration": bot}):
        row = {"owner": alice, "url": scenes.URL} | columns
        Subscription.objects.create(**row)
        with pytest.raises(IntegrityError), transaction.atomic():
            Subscription.objects.create(**row)


def test_each_sees_and_deletes_their_own(alice: User) -> None:
    hers, his = scenes.subscribe(alice), scenes.subscribe(factories.user("bob"))
    browser = client_of(alice)
    listed = browser.get("/_webhook-subscriptions").json()["data"]
    assert [each["id"] for each in listed] == [str(hers.pk)]

    only_error(browser.delete(f"{PATH}/{his.pk}"), 403)
    assert browser.delete(f"{PATH}/{hers.pk}").status_code == 204
    body = {"data": {"type": "webhook-subscription", "id": str(hers.pk)}}
    assert browser.send("DELETE", PATH, body).status_code == 204
    assert list(Subscription.objects.all()) == [his]


def test_an_empty_list_of_fields_selects_none(alice: User) -> None:
    hers = scenes.subscribe(alice)
    response = client_of(alice).get("/_webhook-subscriptions?fields[webhook-subscription]=")
    assert response.status_code == 200
    assert response.json()["data"] == [{"type": "webhook-subscription", "id": str(hers.pk)}]


def test_nobody_without_a_token(client: Any) -> None:
    for method, path in [("post", PATH), ("get", "/_webhook-subscriptions"), ("delete", PATH)]:
        assert getattr(client, method)(path).status_code == 401


@pytest.mark.parametrize("rows", [1, 10])
def test_a_list_takes_as_few_queries_for_many(
    alice: User, rows: int, django_assert_num_queries: Any
) -> None:
    bot = matrix.command().registration
    for _ in range(rows):
        scenes.subscribe(alice, registration=bot)
    with django_assert_num_queries(2):
        assert len(client_of(alice).get("/_webhook-subscriptions").json()["data"]) == rows
