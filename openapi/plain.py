"""Operations of the chat API in plain JSON, and its streams."""

from typing import Any

from agents import inbox
from chat.api.views import MAX_PAGE
from chat.models import MAX_TITLE_LENGTH
from chat.representation import (
    AcceptedJSON,
    FinishedJSON,
    MessageJSON,
    RunJSON,
    ThreadJSON,
    UsageJSON,
)
from openapi.parts import (
    ERROR_CODES,
    ERROR_HEADERS,
    ID,
    IDEMPOTENCY_KEY,
    MESSAGE_ID,
    REASONS,
    REPLAYED,
    RUN_ID,
    THREAD_ID,
    Schema,
    component_of,
    content,
    header,
    in_path,
    many,
    query,
    record,
    ref,
    response,
    text,
)

JSON = "application/json"
OK: Schema = {"const": True}
VISIBLE = r"^[^\x00]*[!-~][^\x00]*$"
CONTENT = text(minLength=1, pattern=VISIBLE, description="The text of the message.")
OPTIONS: dict[str, Schema] = {
    "model": {
        "type": ["string", "null"],
        "minLength": 1,
        "maxLength": inbox.MAX_MODEL_LENGTH,
        "pattern": VISIBLE,
        "description": "One of `GET /api/chat/models`. Defaults to its `default`.",
    },
    "correlationId": {
        "type": ["string", "null"],
        "minLength": 1,
        "maxLength": inbox.MAX_CORRELATION_LENGTH,
        "pattern": VISIBLE,
        "description": "An id of the client, repeated in events and the run.",
    },
    "whenBusy": {
        "enum": [*inbox.WhenBusy, None],
        "description": "What to do if the thread has an unfinished run: queue the message, merge it "
        "with queued ones, reject it (409), or cancel the runs.",
    },
    "deadlineSeconds": {
        "type": ["integer", "null"],
        "minimum": 1,
        "maximum": inbox.MAX_DEADLINE_SECONDS,
        "description": "The run fails if it has not finished by then.",
    },
}

SCHEMAS = {
    "ServerSentEvent": record(
        "id",
        "retry",
        id=text(description="Send it as `Last-Event-ID` to resume after this event."),
        event=text(description="The event type; docs/reference/http.md lists them."),
        data=text(contentMediaType="application/json"),
        retry={"type": "integer"},
    ),
    "Error": record(
        "code",
        ok={"const": False},
        error=text(description="What went wrong. Safe to show to users."),
        code=text(
            description="A stable error code: the kind of limit (429), or `id_deleted` (409) if "
            "`threadId` is the id of a deleted thread."
        ),
    ),
    "MessageRequest": {
        "type": "object",
        "properties": {
            "content": CONTENT,
            **OPTIONS,
            "threadId": {
                "type": ["string", "null"],
                "pattern": ID,
                "description": "The thread of the message. A new id or none creates a thread.",
            },
        },
        "required": ["content"],
        "additionalProperties": False,
    },
    "MessageAttributes": record(*OPTIONS, content=CONTENT, **OPTIONS),
    **{
        kind.__name__.removesuffix("JSON"): component_of(kind)
        for kind in (UsageJSON, ThreadJSON, RunJSON, MessageJSON, AcceptedJSON, FinishedJSON)
    },
}
RUN_EXAMPLE = {
    "id": RUN_ID,
    "threadId": THREAD_ID,
    "correlationId": "order-4711",
    "status": "completed",
    "model": "gpt-4o-mini",
    "usage": {"promptTokens": 12, "completionTokens": 5, "totalTokens": 17, "estimated": False},
    "createdAt": "2026-11-21T13:24:10.503313Z",
    "updatedAt": "2026-11-21T13:24:11.120007Z",
    "output": "It is on its way.",
    "finishReason": "stop",
}
ACCEPTED_EXAMPLE = {
    "ok": True,
    "status": "accepted",
    "runId": RUN_ID,
    "threadId": THREAD_ID,
    "messageId": MESSAGE_ID,
    "model": "gpt-4o-mini",
    "correlationId": "order-4711",
}
THREAD_EXAMPLE = {
    "id": THREAD_ID,
    "title": "My order",
    "preview": "Where is my order?",
    "archived": False,
    "createdAt": "2026-11-21T13:24:10.502882Z",
    "updatedAt": "2026-11-21T13:24:10.502882Z",
}
MESSAGE_EXAMPLE = {
    "id": MESSAGE_ID,
    "threadId": THREAD_ID,
    "role": "user",
    "content": "Where is my order?",
    "correlationId": "order-4711",
    "createdAt": "2026-11-21T13:24:10.502882Z",
}
STREAM_EXAMPLE = (
    'id: 0-0\nevent: run.status\ndata: {"status":"processing","attempt":1}\n\n'
    'id: 1-1\nevent: message.delta\ndata: {"step":1,"text":"It is "}\n\n'
    'id: 1-end\nevent: run.completed\ndata: {"run":{"id":"' + RUN_ID + '"}}\n\n'
)
RESUME = "Resume after this event. The same as `after`."
# Browsers send an empty id to start from the beginning.
RUN_EVENT = "^([0-9]{1,5}-([0-9]{1,10}|end))?$"


def events(description: str) -> Schema:
    return response(
        description,
        content("text/event-stream", ref("ServerSentEvent"), STREAM_EXAMPLE),
        Cache_Control="`no-store`",
    )


RESPONSES = {
    f"Plain{code}": response(
        reason,
        content(
            JSON,
            ref("Error"),
            {"ok": False, "error": reason} | ({"code": ERROR_CODES[code]} if code == 429 else {}),
        ),
        **ERROR_HEADERS.get(code, {}),
    )
    for code, reason in REASONS.items()
    if code >= 400
}


def error_responses(*codes: int) -> dict[str, Schema]:
    return {str(code): ref(f"Plain{code}", "responses") for code in sorted(codes)}


def operation(
    name: str,
    summary: str,
    responses: dict[str, Schema],
    *error_codes: int,
    description: str = "",
    **more: Any,
) -> Schema:
    built: Schema = {"operationId": name, "summary": summary, "tags": ["chat"]}
    if description:
        built["description"] = description
    return built | more | {"responses": responses | error_responses(*error_codes, 401, 403, 503)}


def ok_response(description: str, example: Any, **properties: Schema) -> dict[str, Schema]:
    schema = record(ok=OK, **properties)
    return {"200": response(description, content(JSON, schema, {"ok": True, **example}))}


THREAD_PATH = in_path("thread_id", text(pattern=ID)) | {"example": THREAD_ID}
RUN_PATH = in_path("run_id", text(pattern=ID)) | {"example": RUN_ID}

OPERATIONS: dict[tuple[str, str], Schema] = {
    ("GET", "/api"): {
        "operationId": "isRunning",
        "summary": "Check that the API is running",
        "tags": ["chat"],
        "security": [],
        "responses": ok_response(
            "It is running.", {"message": "API is running"}, message={"const": "API is running"}
        ),
    },
    ("POST", "/api/chat/messages"): operation(
        "sendMessage",
        "Send a message",
        {
            "200": response(
                "The run finished while the client waited, or the stream of the run.",
                content(
                    JSON,
                    ref("Finished"),
                    ACCEPTED_EXAMPLE | {"status": "completed", "run": RUN_EXAMPLE},
                )
                | content("text/event-stream", ref("ServerSentEvent"), STREAM_EXAMPLE),
                Preference_Applied="The maximum wait, in seconds.",
                **REPLAYED,
            ),
            "202": response(
                "Accepted; the run is queued.",
                content(JSON, ref("Accepted"), ACCEPTED_EXAMPLE),
                Location="The run.",
                **REPLAYED,
            ),
        },
        400,
        404,
        409,
        413,
        422,
        429,
        description="The message, its run and its event are committed together. `Prefer: wait=N` "
        "waits for the outcome; `Accept: text/event-stream` returns the stream of the run.",
        parameters=[
            header("Prefer", "`wait=30`: wait up to 30 seconds for the outcome."),
            IDEMPOTENCY_KEY,
        ],
        requestBody={
            "required": True,
            "content": content(
                JSON,
                ref("MessageRequest"),
                minimal={"content": "Where is my order?"},
                full={
                    "content": "And tomorrow?",
                    "model": "gpt-4o-mini",
                    "threadId": THREAD_ID,
                    "correlationId": "order-4711",
                },
            ),
        },
    ),
    ("GET", "/api/chat/threads"): operation(
        "listThreads",
        "List threads, most recent first",
        ok_response(
            "Pass `next` as `before` for the next page.",
            {"threads": [THREAD_EXAMPLE], "next": None},
            threads=many(ref("Thread")),
            next={"type": ["string", "null"], "pattern": ID},
        ),
        400,
        404,
        parameters=[
            query("limit", "Page size.", {"type": "integer", "minimum": 1, "maximum": MAX_PAGE}),
            query("before", "The id of the last thread of the previous page.", text(pattern=ID)),
            query("archived", "Include archived threads.", {"type": "boolean"}),
        ],
    ),
    ("GET", "/api/chat/threads/{thread_id}"): operation(
        "getThread",
        "Get a thread",
        ok_response("The thread.", {"thread": THREAD_EXAMPLE}, thread=ref("Thread")),
        404,
        parameters=[THREAD_PATH],
    ),
    ("PATCH", "/api/chat/threads/{thread_id}"): operation(
        "updateThread",
        "Rename, archive or unarchive a thread",
        ok_response("The updated thread.", {"thread": THREAD_EXAMPLE}, thread=ref("Thread")),
        400,
        404,
        413,
        parameters=[THREAD_PATH],
        requestBody={
            "required": False,
            "content": content(
                JSON,
                {
                    "type": "object",
                    "properties": {
                        "title": text(maxLength=MAX_TITLE_LENGTH, pattern=r"^[^\x00]*$"),
                        "archived": {"type": "boolean"},
                    },
                    "additionalProperties": False,
                },
                {"title": "My order"},
            ),
        },
    ),
    ("DELETE", "/api/chat/threads/{thread_id}"): operation(
        "deleteThread",
        "Delete a thread and its messages",
        {"204": response("Deleted. Its unfinished runs are cancelled.")},
        404,
        parameters=[THREAD_PATH],
    ),
    ("GET", "/api/chat/threads/{thread_id}/messages"): operation(
        "listMessages",
        "List the messages of a thread, newest page first",
        ok_response(
            "A page in chronological order. Pass `next` as `before` for the previous page.",
            {"messages": [MESSAGE_EXAMPLE], "next": None},
            messages=many(ref("Message")),
            next={"type": ["string", "null"], "format": "uuid"},
        ),
        400,
        404,
        parameters=[
            THREAD_PATH,
            query(
                "limit",
                "Maximum page size. Long messages make a page smaller.",
                {"type": "integer", "minimum": 1, "maximum": MAX_PAGE},
            ),
            query("before", "The id of the first message of the page after.", text(format="uuid")),
        ],
    ),
    ("GET", "/api/chat/threads/{thread_id}/events"): operation(
        "streamThread",
        "Stream the events of a thread",
        {
            "200": events(
                "`message.created` and the outcomes of runs, numbered 1, 2, 3 ... Ends with "
                "`stream.closed` if access is lost or the thread is deleted."
            )
        },
        400,
        404,
        429,
        parameters=[
            THREAD_PATH,
            query("after", "The number of the last event received.", text(pattern="^[0-9]{0,9}$")),
            header("Last-Event-ID", RESUME, text(pattern="^[0-9]{0,9}$")),
        ],
    ),
    ("GET", "/api/chat/runs/{run_id}"): operation(
        "getRun",
        "Get a run",
        ok_response("The run.", {"run": RUN_EXAMPLE}, run=ref("Run")),
        404,
        parameters=[RUN_PATH],
    ),
    ("GET", "/api/chat/runs/{run_id}/events"): operation(
        "streamRun",
        "Stream the events of a run",
        {
            "200": events(
                "Status, steps and text as they are produced, up to the outcome, or to "
                "`stream.closed` if access is lost."
            ),
            "204": response("No events are left: `after` is the id of the outcome."),
        },
        400,
        404,
        429,
        parameters=[
            RUN_PATH,
            query("after", "The id of the last event received.", text(pattern=RUN_EVENT)),
            header("Last-Event-ID", RESUME, text(pattern=RUN_EVENT)),
        ],
    ),
    ("POST", "/api/chat/runs/{run_id}/cancel"): operation(
        "cancelRun",
        "Cancel a run",
        {
            "202": response(
                "Cancelled.",
                content(
                    JSON,
                    record(ok=OK, run=ref("Run")),
                    {"ok": True, "run": RUN_EXAMPLE | {"status": "cancelled"}},
                ),
            )
        },
        404,
        409,
        parameters=[RUN_PATH],
    ),
    ("POST", "/api/chat/runs/{run_id}/retry"): operation(
        "retryRun",
        "Retry a failed or cancelled run",
        {
            "202": response(
                "Queued again.",
                content(
                    JSON,
                    record(ok=OK, run=ref("Run")),
                    {"ok": True, "run": RUN_EXAMPLE | {"status": "queued"}},
                ),
            )
        },
        404,
        409,
        429,
        parameters=[RUN_PATH],
    ),
    ("GET", "/api/chat/models"): operation(
        "listModels",
        "List the allowed models",
        ok_response(
            "The allowed models.",
            {"models": ["gpt-4o-mini"], "default": "gpt-4o-mini", "anyModel": True, "echo": False},
            models=many(text()),
            default=text(),
            anyModel={"type": "boolean", "description": "Other models are allowed as well."},
            echo={
                "type": "boolean",
                "description": "No model is configured; answers echo the message.",
            },
        ),
    ),
}
