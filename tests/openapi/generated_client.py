"""Use a Python client of openapi-python-client: `generated_client.py URL TOKEN USER`.

It runs in a folder with that client as the package `client`, in a process of its own.
"""

# mypy: ignore-errors
import sys
from http import HTTPStatus

from client import AuthenticatedClient, Client, models
from client.api.chat import (
    cancel_run,
    delete_thread,
    get_run,
    list_threads,
    retry_run,
    send_message,
    update_thread,
)
from client.api.realm import (
    add_command,
    delete_bot,
    delete_command,
    delete_webhook,
    list_bots,
    list_commands,
    open_session,
    register_bot,
    subscribe,
)
from client.api.resources import get_runs, get_threads, post_messages

url, token, user = sys.argv[1:]
api = AuthenticatedClient(base_url=url, token=token)


def ok(response, status):
    assert response.status_code == status, (response.status_code, response.content)
    return response.parsed


# Create: plain JSON and JSON:API.
accepted = ok(
    send_message.sync_detailed(client=api, body=models.MessageRequest(content="One")),
    HTTPStatus.ACCEPTED,
)
thread = accepted.thread_id
document = models.NewMessageDocument.from_dict(
    {
        "data": {
            "type": "messages",
            "attributes": {"content": "Two"},
            "relationships": {"thread": {"data": {"type": "threads", "id": thread}}},
        }
    }
)
created = ok(
    post_messages.sync_detailed(client=api, body=document, idempotency_key="once"),
    HTTPStatus.CREATED,
)
assert created.data.attributes.content == "Two"
for number in range(2):
    body = models.MessageRequest(content=f"Another {number}")
    ok(send_message.sync_detailed(client=api, body=body), HTTPStatus.ACCEPTED)

# Cancel and retry; errors in both forms.
run = ok(get_run.sync_detailed(accepted.run_id, client=api), HTTPStatus.OK).run
assert run.id == accepted.run_id
ok(cancel_run.sync_detailed(run.id, client=api), HTTPStatus.ACCEPTED)
ok(retry_run.sync_detailed(run.id, client=api), HTTPStatus.ACCEPTED)
missing = ok(get_run.sync_detailed("run_missing", client=api), HTTPStatus.NOT_FOUND)
assert isinstance(missing, models.Error), missing

# Pages, include, filters and sparse fields.
path = models.GetThreadsIncludeItem
page = ok(
    get_threads.sync_detailed(client=api, pagesize=2, include=[path.MESSAGES, path.RUNS]),
    HTTPStatus.OK,
)
assert len(page.data) == 2
assert page.links.next_, page.links
assert {each.type_ for each in page.included} == {"messages", "runs"}
status = models.GetRunsFilterstatusItem
queued = ok(
    get_runs.sync_detailed(client=api, filterstatus=[status.QUEUED, status.CANCELLED]),
    HTTPStatus.OK,
)
assert len(queued.data) == 4, queued
first = ok(list_threads.sync_detailed(client=api, limit=2), HTTPStatus.OK)
second = ok(list_threads.sync_detailed(client=api, limit=2, before=first.next_), HTTPStatus.OK)
assert len(first.threads) + len(second.threads) == 3
title = models.UpdateThreadBody.from_dict({"title": "Named"})
ok(update_thread.sync_detailed(thread, client=api, body=title), HTTPStatus.OK)
bad = models.NewMessageDocument.from_dict(
    {"data": {"type": "messages", "attributes": {"content": ""}}}
)
refused = ok(post_messages.sync_detailed(client=api, body=bad), HTTPStatus.BAD_REQUEST)
assert refused.errors[0].source.pointer == "/data/attributes/content", refused

# The realm server.
session = models.NewSession(access_token="an-openid-token")
opened = open_session.sync_detailed(client=Client(base_url=url), body=session)
assert opened.headers["authorization"], ok(opened, HTTPStatus.CREATED)
bot = models.NewBotRegistration.from_dict(
    {"data": {"type": "bot-registration", "attributes": {"username": user}}}
)
registered = ok(register_bot.sync_detailed(client=api, body=bot), HTTPStatus.CREATED).data
assert [each.id for each in ok(list_bots.sync_detailed(client=api), HTTPStatus.OK).data] == [
    registered.id
]
command = models.NewBotCommand.from_dict(
    {
        "data": {
            "type": "bot-command",
            "attributes": {
                "botId": registered.id,
                "command": "chat.reply",
                "filter": {
                    "type": "matrix-event",
                    "event_type": "m.room.message",
                    "content_type": "m.text",
                    "prefix": "!ask ",
                },
            },
        }
    }
)
added = ok(add_command.sync_detailed(client=api, body=command), HTTPStatus.CREATED).data
assert len(ok(list_commands.sync_detailed(client=api), HTTPStatus.OK).data) == 1
hook = models.NewWebhookSubscription.from_dict(
    {
        "data": {
            "type": "webhook-subscription",
            "attributes": {"url": "https://hooks.example.org/runs"},
        }
    }
)
subscribed = ok(subscribe.sync_detailed(client=api, body=hook), HTTPStatus.CREATED).data

# Delete.
for operation, model, kind, row in (
    (delete_webhook, models.WebhookSubscriptionIdentifier, "webhook-subscription", subscribed.id),
    (delete_command, models.BotCommandIdentifier, "bot-command", added.id),
    (delete_bot, models.BotRegistrationIdentifier, "bot-registration", registered.id),
):
    body = model.from_dict({"data": {"type": kind, "id": str(row)}})
    ok(operation.sync_detailed(client=api, body=body), HTTPStatus.NO_CONTENT)
ok(delete_thread.sync_detailed(thread, client=api), HTTPStatus.NO_CONTENT)
