"""Operations of the realm server."""

from typing import Any

from drf_spectacular.utils import extend_schema_field

from openapi.parts import (
    MEDIA_TYPE,
    Schema,
    content,
    document,
    error_responses,
    in_path,
    json_api,
    many,
    new_resource,
    query,
    record,
    ref,
    requiring,
    response,
    sparse_fields,
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
extend_schema_field(ref("EventFilter"))(FilterField)
EXAMPLE_FILTER = {
    "type": MATRIX_EVENT,
    "event_type": "m.room.message",
    "content_type": "m.text",
    "prefix": "!ask ",
}
TOKEN = text(minLength=1, maxLength=openid.MAX_TOKEN_LENGTH, pattern="^[!-~]+$")
COMMON_ERRORS = (401, 406, 415, 503)


def resource(kind: str, **attributes: Schema) -> Schema:
    """Build the schema of a document that creates a resource."""
    return new_resource(kind, record(**attributes))


def identifier_document(kind: str) -> Schema:
    """Build the schema of a document that names a resource to delete."""
    return document(json_api("lid", type={"const": kind}, id=text(format="uuid"), lid={}))


# Bodies with a name, after which generated clients name their types.
DOCUMENTS = {
    "EventFilter": FILTER,
    "NewSession": requiring(access_token=TOKEN),
    "NewBotRegistration": resource(
        "bot-registration", username=text(pattern="^@[!-9;-~]+:[A-Za-z0-9.-]+$")
    ),
    "NewBotCommand": resource(
        "bot-command",
        botId=text(format="uuid"),
        command=text(minLength=1, maxLength=BotCommand._meta.get_field("command").max_length),
        filter=ref("EventFilter"),
    ),
    "NewWebhookSubscription": new_resource(
        "webhook-subscription",
        record(
            "botId",
            "events",
            url=text(maxLength=2000, pattern="^https://"),
            botId={"type": ["string", "null"], "format": "uuid"},
            events=many(text(enum=list(EVENTS))) | {"minItems": 1},
        ),
    ),
    "BotRegistrationIdentifier": identifier_document("bot-registration"),
    "BotCommandIdentifier": identifier_document("bot-command"),
    "WebhookSubscriptionIdentifier": identifier_document("webhook-subscription"),
}


def create(
    name: str, summary: str, body: Schema, resource_schema: Schema, example: Any, *error_codes: int
) -> Schema:
    return {
        "operationId": name,
        "summary": summary,
        "tags": ["realm"],
        "requestBody": {"required": True, "content": content(MEDIA_TYPE, body, example)},
        "responses": {
            "201": response("Created.", content(MEDIA_TYPE, record(data=resource_schema))),
            **error_responses(400, 403, 404, 409, 413, *error_codes, *COMMON_ERRORS),
        },
    }


def list_all(
    name: str, summary: str, resource_schema: Schema, *parameters: Schema, error_codes: Any = ()
) -> Schema:
    return {
        "operationId": name,
        "summary": summary,
        "tags": ["realm"],
        "parameters": list(parameters),
        "responses": {
            "200": response(
                "All of them.", content(MEDIA_TYPE, record(data=many(resource_schema)))
            ),
            **error_responses(400, 403, 404, *error_codes, *COMMON_ERRORS),
        },
    }


def delete(name: str, kind: str, *, in_body: bool) -> Schema:
    operation: Schema = {
        "operationId": name,
        "summary": f"Delete a {kind}, by its id in the {'body' if in_body else 'path'}",
        "tags": ["realm"],
        "responses": {
            "204": response("Deleted, or did not exist."),
            **error_responses(400, 403, 404, 409, 413, *COMMON_ERRORS),
        },
    }
    if not in_body:
        return operation | {"parameters": [in_path("id", text(format="uuid"))]}
    document = "".join(word.capitalize() for word in kind.split("-")) + "Identifier"
    example = {"data": {"type": kind, "id": BOT_ID}}
    return operation | {
        "requestBody": {"required": True, "content": content(MEDIA_TYPE, ref(document), example)}
    }


def fields(kind: str, *names: str) -> Schema:
    return sparse_fields(kind, names)


def session(schema: Any) -> Schema:
    operation = create(
        "openSession",
        "Exchange a Matrix OpenID token for a realm-server JWT",
        ref("NewSession"),
        schema.resource(SessionSerializer),
        None,
        429,
        502,
    )
    # One media type: openapi-python-client 0.29.1 generates code without an import for two.
    operation["requestBody"]["content"] = content(
        "application/json", ref("NewSession"), {"access_token": ACCESS_TOKEN}
    )
    operation["description"] = (
        f"A JSON:API document of the type `server-session` with this attribute is accepted as well, as "
        f"`{MEDIA_TYPE}`."
    )
    operation["security"] = []
    operation["responses"]["201"]["headers"] = {
        "Authorization": {"description": "The JWT.", "schema": text()}
    }
    return operation


def register(schema: Any) -> Schema:
    return create(
        "registerBot",
        "Register a bot for your Matrix id",
        ref("NewBotRegistration"),
        schema.resource(BotRegistrationSerializer),
        {"data": {"type": "bot-registration", "attributes": {"username": USER}}},
    )


def registrations(schema: Any) -> Schema:
    resource_schema = schema.resource(BotRegistrationSerializer)
    some = fields("bot-registration", "username", "enabled", "createdAt")
    return list_all("listBots", "List your bots", resource_schema, some)


def add_command(schema: Any) -> Schema:
    example = {"botId": BOT_ID, "command": "chat.reply", "filter": EXAMPLE_FILTER}
    return create(
        "addCommand",
        "Add a command that a bot runs when an event matches a filter",
        ref("NewBotCommand"),
        schema.resource(BotCommandSerializer),
        {"data": {"type": "bot-command", "attributes": example}},
    )


def commands(schema: Any) -> Schema:
    resource_schema = schema.resource(BotCommandSerializer)
    some = fields("bot-command", "botId", "command", "filter", "createdAt")
    of_bot = query("botId", "Commands of one bot.", text(format="uuid"))
    return list_all("listCommands", "List the commands of your bots", resource_schema, of_bot, some)


def subscribe(schema: Any) -> Schema:
    operation = create(
        "subscribe",
        "Deliver the outcomes of your runs to a URL",
        ref("NewWebhookSubscription"),
        schema.resource(NewSubscriptionSerializer),
        {"data": {"type": "webhook-subscription", "attributes": {"url": HOOK_URL}}},
    )
    operation["description"] = (
        "The response contains the signing secret, which is not shown again. The URL is normalised; "
        "a second webhook to the same URL for the same runs is rejected (409). Settings restrict the "
        "allowed hosts."
    )
    return operation


def subscriptions(schema: Any) -> Schema:
    resource_schema = schema.resource(SubscriptionSerializer)
    names = ("url", "botId", "events", "enabled", "disabledReason", "createdAt")
    return list_all(
        "listWebhooks",
        "List your webhooks",
        resource_schema,
        fields("webhook-subscription", *names),
    )


OPERATIONS = {
    ("POST", "/_webhook-subscription"): subscribe,
    ("GET", "/_webhook-subscriptions"): subscriptions,
    ("DELETE", "/_webhook-subscription"): lambda _: delete(
        "deleteWebhook", "webhook-subscription", in_body=True
    ),
    ("DELETE", "/_webhook-subscription/{id}"): lambda _: delete(
        "deleteWebhookById", "webhook-subscription", in_body=False
    ),
    ("POST", "/_server-session"): session,
    ("POST", "/_bot-registration"): register,
    ("GET", "/_bot-registrations"): registrations,
    ("DELETE", "/_bot-registration"): lambda _: delete(
        "deleteBot", "bot-registration", in_body=True
    ),
    ("DELETE", "/_bot-registration/{id}"): lambda _: delete(
        "deleteBotById", "bot-registration", in_body=False
    ),
    ("POST", "/_bot-commands"): add_command,
    ("GET", "/_bot-commands"): commands,
    ("DELETE", "/_bot-commands"): lambda _: delete("deleteCommand", "bot-command", in_body=True),
    ("DELETE", "/_bot-commands/{id}"): lambda _: delete(
        "deleteCommandById", "bot-command", in_body=False
    ),
}
