"""The realm server's documents."""

from typing import Any

from drf_spectacular.utils import extend_schema_field

from openapi.parts import (
    ATTRIBUTE_NAMES,
    MEDIA_TYPE,
    Schema,
    answer,
    content,
    in_path,
    many,
    needing,
    new_resource,
    query,
    record,
    refusals,
    text,
)
from realm import openid
from realm.filters import EVENT_TYPES, MATRIX_EVENT, MAX_LENGTH
from realm.models import BotCommand
from realm.serializers import BotCommandSerializer, BotRegistrationSerializer, FilterField
from realm.serializers import ServerSessionSerializer as SessionSerializer
from webhooks.models import EVENTS
from webhooks.serializers import NewSubscriptionSerializer, SubscriptionSerializer

BOT_ID = "9b2c3f0e-8a4b-4a57-9f3c-0d8f5c1f2f11"
USER = "@you:localhost"
HOOK_URL = "https://hooks.example.org/runs"
ACCESS_TOKEN = "syt_eW91_0123456789"  # noqa: S105
FILTER = record(
    "prefix",
    "mention",
    type={"const": MATRIX_EVENT},
    event_type=text(enum=list(EVENT_TYPES)),
    content_type=text(minLength=1, maxLength=MAX_LENGTH, pattern="^[ -~]*[!-~][ -~]*$"),
    prefix={"type": ["string", "null"], "maxLength": MAX_LENGTH, "pattern": "^[ -~]*[!-~][ -~]*$"},
    mention={"type": ["boolean", "null"]},
)
extend_schema_field(FILTER)(FilterField)
EXAMPLE_FILTER = {
    "type": MATRIX_EVENT,
    "event_type": "m.room.message",
    "content_type": "m.text",
    "prefix": "!ask ",
}
REFUSED = (401, 406, 415, 503)


def resource(kind: str, **attributes: Schema) -> Schema:
    """The document that makes one."""
    return new_resource(kind, needing(**attributes) | ATTRIBUTE_NAMES)


def make(
    name: str, summary: str, body: Schema, told: Schema, example: Any, *refused: int
) -> Schema:
    return {
        "operationId": name,
        "summary": summary,
        "tags": ["realm"],
        "requestBody": {"required": True, "content": content(MEDIA_TYPE, body, example)},
        "responses": {
            "201": answer("It is there.", content(MEDIA_TYPE, record(data=told))),
            **refusals(400, 403, 404, 409, 411, 413, *refused, *REFUSED),
        },
    }


def show(name: str, summary: str, told: Schema, *parameters: Schema, refused: Any = ()) -> Schema:
    return {
        "operationId": name,
        "summary": summary,
        "tags": ["realm"],
        "parameters": list(parameters),
        "responses": {
            "200": answer("All of them.", content(MEDIA_TYPE, record(data=many(told)))),
            **refusals(400, 403, 404, *refused, *REFUSED),
        },
    }


def drop(name: str, kind: str, *, in_body: bool) -> Schema:
    made: Schema = {
        "operationId": name,
        "summary": f"Delete a {kind}, by its id in the {'body' if in_body else 'path'}",
        "tags": ["realm"],
        "responses": {
            "204": answer("It is gone, or was."),
            **refusals(400, 403, 404, 409, 411, 413, *REFUSED),
        },
    }
    if not in_body:
        return made | {"parameters": [in_path("id", text(format="uuid"))]}
    which = {"type": {"const": kind}, "id": text(format="uuid")}
    document = needing(data=needing(**which))
    example = {"data": {"type": kind, "id": BOT_ID}}
    return made | {
        "requestBody": {"required": True, "content": content(MEDIA_TYPE, document, example)}
    }


def fields(kind: str, *names: str) -> Schema:
    some = many(text(enum=list(names)))
    return query(f"fields[{kind}]", "Tell only these.", some, style="form", explode=False)


def session(schema: Any) -> Schema:
    token = text(minLength=1, maxLength=openid.MAX_TOKEN_LENGTH, pattern="^[!-~]+$")
    made = make(
        "openSession",
        "A realm-server JWT for a Matrix OpenID token",
        needing(access_token=token),
        schema.resource(SessionSerializer),
        None,
        429,
        502,
    )
    as_document = resource("server-session", access_token=token)
    body = content(
        "application/json",
        made["requestBody"]["content"][MEDIA_TYPE]["schema"],
        {"access_token": ACCESS_TOKEN},
    )
    made["requestBody"]["content"] = body | content(MEDIA_TYPE, as_document)
    made["security"] = []
    made["responses"]["201"]["headers"] = {
        "Authorization": {"description": "The JWT.", "schema": text()}
    }
    return made


def register(schema: Any) -> Schema:
    return make(
        "registerBot",
        "Register a bot for one's own Matrix id",
        resource("bot-registration", username=text(pattern="^@[!-9;-~]+:[A-Za-z0-9.-]+$")),
        schema.resource(BotRegistrationSerializer),
        {"data": {"type": "bot-registration", "attributes": {"username": USER}}},
    )


def registrations(schema: Any) -> Schema:
    told = schema.resource(BotRegistrationSerializer)
    some = fields("bot-registration", "username", "enabled", "createdAt")
    return show("listBots", "One's registered bots", told, some)


def add_command(schema: Any) -> Schema:
    length = BotCommand._meta.get_field("command").max_length
    attributes = {
        "botId": text(format="uuid"),
        "command": text(minLength=1, maxLength=length),
        "filter": FILTER,
    }
    example = {"botId": BOT_ID, "command": "chat.reply", "filter": EXAMPLE_FILTER}
    return make(
        "addCommand",
        "Say what a bot does when an event passes a filter",
        resource("bot-command", **attributes),
        schema.resource(BotCommandSerializer),
        {"data": {"type": "bot-command", "attributes": example}},
    )


def commands(schema: Any) -> Schema:
    told = schema.resource(BotCommandSerializer)
    some = fields("bot-command", "botId", "command", "filter", "createdAt")
    of_bot = query("botId", "Those of one bot.", text(format="uuid"))
    return show("listCommands", "The commands of one's bots", told, of_bot, some)


def subscribe(schema: Any) -> Schema:
    """Which hosts may be named, a setting says."""
    events = many(text(enum=list(EVENTS))) | {"minItems": 1}
    made = make(
        "subscribe",
        "Have the outcomes of one's runs posted to a URL",
        new_resource(
            "webhook-subscription",
            {
                "type": "object",
                "properties": {
                    "url": text(maxLength=2000, pattern="^https://"),
                    "botId": {"type": ["string", "null"], "format": "uuid"},
                    "events": events,
                },
                "required": ["url"],
                **ATTRIBUTE_NAMES,
            },
        ),
        schema.resource(NewSubscriptionSerializer),
        {"data": {"type": "webhook-subscription", "attributes": {"url": HOOK_URL}}},
    )
    made["description"] = (
        "The answer has the secret that deliveries are signed with, once. The URL is kept in its "
        "normal form; a second webhook to the same URL for the same runs is refused (409)."
    )
    return made


def subscriptions(schema: Any) -> Schema:
    told = schema.resource(SubscriptionSerializer)
    names = ("url", "botId", "events", "enabled", "disabledReason", "createdAt")
    return show("listWebhooks", "One's webhooks", told, fields("webhook-subscription", *names))


OPERATIONS = {
    ("POST", "/_webhook-subscription"): subscribe,
    ("GET", "/_webhook-subscriptions"): subscriptions,
    ("DELETE", "/_webhook-subscription"): lambda _: drop(
        "deleteWebhook", "webhook-subscription", in_body=True
    ),
    ("DELETE", "/_webhook-subscription/{id}"): lambda _: drop(
        "deleteWebhookById", "webhook-subscription", in_body=False
    ),
    ("POST", "/_server-session"): session,
    ("POST", "/_bot-registration"): register,
    ("GET", "/_bot-registrations"): registrations,
    ("DELETE", "/_bot-registration"): lambda _: drop("deleteBot", "bot-registration", in_body=True),
    ("DELETE", "/_bot-registration/{id}"): lambda _: drop(
        "deleteBotById", "bot-registration", in_body=False
    ),
    ("POST", "/_bot-commands"): add_command,
    ("GET", "/_bot-commands"): commands,
    ("DELETE", "/_bot-commands"): lambda _: drop("deleteCommand", "bot-command", in_body=True),
    ("DELETE", "/_bot-commands/{id}"): lambda _: drop(
        "deleteCommandById", "bot-command", in_body=False
    ),
}
