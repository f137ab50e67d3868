"""The chat server's plain JSON, and its streams."""

from typing import Any

from agents import inbox
from agents.models import Run
from chat.api.views import MAX_PAGE
from chat.models import MAX_TITLE_LENGTH, Message
from openapi.parts import (
    ATTRIBUTE_NAMES,
    CODES,
    ID,
    IDEMPOTENCY_KEY,
    MESSAGE_ID,
    REASONS,
    REPLAYED,
    RUN_ID,
    THREAD_ID,
    WITH,
    Schema,
    answer,
    content,
    header,
    in_path,
    many,
    moment,
    query,
    record,
    ref,
    text,
)

JSON = "application/json"
OK: Schema = {"const": True}
COUNT: Schema = {"type": "integer", "minimum": 0}
VISIBLE = r"^[^\x00]*[!-~][^\x00]*$"
CONTENT = text(minLength=1, pattern=VISIBLE, description="What is asked.")
WISHES: dict[str, Schema] = {
    "model": {
        "type": ["string", "null"],
        "minLength": 1,
        "maxLength": inbox.MAX_MODEL_LENGTH,
        "pattern": VISIBLE,
        "description": "One of `GET /api/chat/models`; the default one where it is left out.",
    },
    "correlationId": {
        "type": ["string", "null"],
        "minLength": 1,
        "maxLength": inbox.MAX_CORRELATION_LENGTH,
        "pattern": VISIBLE,
        "description": "The client's own; events and the run carry it.",
    },
    "whenBusy": {
        "enum": [*inbox.WhenBusy, None],
        "description": "What becomes of it while runs of its thread have not ended: it waits, is "
        "answered together with those that wait, is refused (409), or cancels them.",
    },
    "deadlineSeconds": {
        "type": ["integer", "null"],
        "minimum": 1,
        "maximum": inbox.MAX_DEADLINE_SECONDS,
        "description": "What has not ended by then fails.",
    },
}
STATUSES = text(enum=Run.Status.values)

SCHEMAS = {
    "ServerSentEvent": record(
        "id",
        "retry",
        id=text(description="What `Last-Event-ID` may name to go on after it."),
        event=text(description="Its type; docs/reference/http.md has the table."),
        data=text(contentMediaType="application/json"),
        retry={"type": "integer"},
    ),
    "Error": record(
        "code",
        ok={"const": False},
        error=text(description="What is wrong, safe to show."),
        code=text(
            description="For programs, and does not change: with 429 the kind of limit, with 409 "
            "`id_deleted` where `threadId` is that of a deleted thread."
        ),
    ),
    "Usage": record(promptTokens=COUNT, completionTokens=COUNT, totalTokens=COUNT),
    "Thread": record(
        id=text(pattern=ID),
        title=text(maxLength=MAX_TITLE_LENGTH, description="Empty where nobody gave it one."),
        preview=text(description="The first words that were asked in it."),
        archived={"type": "boolean"},
        createdAt=moment(),
        updatedAt=moment(),
    ),
    "Run": record(
        "deadlineAt",
        "mergedInto",
        "output",
        "safeError",
        "errorCode",
        id=text(pattern=ID),
        threadId=text(pattern=ID),
        correlationId=text(),
        status=STATUSES,
        model=text(),
        usage=ref("Usage"),
        createdAt=moment(),
        updatedAt=moment(),
        output=text(description="The answer, as Markdown. Of a completed run."),
        deadlineAt=moment(),
        mergedInto=text(pattern=ID, description="The run that answers its question too."),
        safeError=text(description="What went wrong. Of a failed run."),
        errorCode=text(description="The same for programs."),
    ),
    "Message": record(
        id=text(format="uuid"),
        threadId=text(pattern=ID),
        role=text(enum=Message.Role.values),
        content=text(),
        correlationId=text(),
        createdAt=moment(),
    ),
    "Question": {
        "type": "object",
        "properties": {
            "content": CONTENT,
            **WISHES,
            "threadId": {
                "type": ["string", "null"],
                "pattern": ID,
                "description": "Where to ask. A new name begins a thread, and so does none.",
            },
        },
        "required": ["content"],
    },
    "NewMessage": {
        "type": "object",
        "properties": {"content": CONTENT, **WISHES},
        "required": ["content"],
        **ATTRIBUTE_NAMES,
    },
    "Accepted": record(
        ok=OK,
        status={"const": "accepted"},
        runId=text(pattern=ID),
        threadId=text(pattern=ID),
        messageId=text(format="uuid"),
        model=text(),
        correlationId=text(),
    ),
    "Ended": record(
        ok=OK,
        status=STATUSES,
        runId=text(pattern=ID),
        threadId=text(pattern=ID),
        messageId=text(format="uuid"),
        model=text(),
        correlationId=text(),
        run=ref("Run"),
    ),
}
RUN_EXAMPLE = {
    "id": RUN_ID,
    "threadId": THREAD_ID,
    "correlationId": "order-4711",
    "status": "completed",
    "model": "gpt-4o-mini",
    "usage": {"promptTokens": 12, "completionTokens": 5, "totalTokens": 17},
    "createdAt": "2026-11-21T13:24:10.503313Z",
    "updatedAt": "2026-11-21T13:24:11.120007Z",
    "output": "It is on its way.",
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
GO_ON = "Go on after this event, as `after` says it too."
# Empty: from the beginning, which is how a browser says it.
RUN_EVENT = "^([0-9]{1,5}-([0-9]{1,10}|end))?$"


def events(description: str) -> Schema:
    return answer(
        description,
        content("text/event-stream", ref("ServerSentEvent"), STREAM_EXAMPLE),
        Cache_Control="`no-store`",
    )


RESPONSES = {
    f"Plain{code}": answer(
        why,
        content(
            JSON,
            ref("Error"),
            {"ok": False, "error": why} | ({"code": CODES[code]} if code == 429 else {}),
        ),
        **WITH.get(code, {}),
    )
    for code, why in REASONS.items()
    if code >= 400
}


def refusals(*codes: int) -> dict[str, Schema]:
    return {str(code): ref(f"Plain{code}", "responses") for code in sorted(codes)}


def operation(
    name: str,
    summary: str,
    answers: dict[str, Schema],
    *refused: int,
    description: str = "",
    **more: Any,
) -> Schema:
    made: Schema = {"operationId": name, "summary": summary, "tags": ["chat"]}
    if description:
        made["description"] = description
    return made | more | {"responses": answers | refusals(*refused, 401, 403, 503)}


def told(description: str, example: Any, **properties: Schema) -> dict[str, Schema]:
    schema = record(ok=OK, **properties)
    return {"200": answer(description, content(JSON, schema, {"ok": True, **example}))}


THREAD_PATH = in_path("thread_id", text(pattern=ID)) | {"example": THREAD_ID}
RUN_PATH = in_path("run_id", text(pattern=ID)) | {"example": RUN_ID}

OPERATIONS: dict[tuple[str, str], Schema] = {
    ("GET", "/api"): {
        "operationId": "isRunning",
        "summary": "Say that the API is there",
        "tags": ["chat"],
        "security": [],
        "responses": told(
            "It is.", {"message": "API is running"}, message={"const": "API is running"}
        ),
    },
    ("POST", "/api/chat/messages"): operation(
        "ask",
        "Ask",
        {
            "200": answer(
                "The outcome came while the client waited; or the stream of the run.",
                content(
                    JSON,
                    ref("Ended"),
                    ACCEPTED_EXAMPLE | {"status": "completed", "run": RUN_EXAMPLE},
                )
                | content("text/event-stream", ref("ServerSentEvent"), STREAM_EXAMPLE),
                Preference_Applied="The seconds that were waited at most.",
                **REPLAYED,
            ),
            "202": answer(
                "Accepted: it will be answered.",
                content(JSON, ref("Accepted"), ACCEPTED_EXAMPLE),
                Location="The run.",
                **REPLAYED,
            ),
        },
        400,
        404,
        409,
        411,
        413,
        422,
        429,
        description="The message, its run and the event that asks for it are recorded together. With "
        "`Prefer: wait=N` the outcome is waited for; with `Accept: text/event-stream` the answer is "
        "the stream of the run.",
        parameters=[
            header("Prefer", "`wait=30`: wait so many seconds for the outcome."),
            IDEMPOTENCY_KEY,
        ],
        requestBody={
            "required": True,
            "content": content(
                JSON,
                ref("Question"),
                short={"content": "Where is my order?"},
                whole={
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
        "One's threads, the last asked in first",
        told(
            "`next` is the `before` of the page after it.",
            {"threads": [THREAD_EXAMPLE], "next": None},
            threads=many(ref("Thread")),
            next={"type": ["string", "null"], "pattern": ID},
        ),
        400,
        404,
        parameters=[
            query("limit", "How many.", {"type": "integer", "minimum": 1, "maximum": MAX_PAGE}),
            query("before", "A thread: those after it in this order.", text(pattern=ID)),
            query("archived", "With those that are archived.", {"type": "boolean"}),
        ],
    ),
    ("GET", "/api/chat/threads/{thread_id}"): operation(
        "readThread",
        "A thread",
        told("The thread.", {"thread": THREAD_EXAMPLE}, thread=ref("Thread")),
        404,
        parameters=[THREAD_PATH],
    ),
    ("PATCH", "/api/chat/threads/{thread_id}"): operation(
        "changeThread",
        "Give a thread a title, archive it or bring it back",
        told("As it is now.", {"thread": THREAD_EXAMPLE}, thread=ref("Thread")),
        400,
        404,
        411,
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
                },
                {"title": "My order"},
            ),
        },
    ),
    ("DELETE", "/api/chat/threads/{thread_id}"): operation(
        "deleteThread",
        "Delete a thread with all that was said in it",
        {"204": answer("It is gone; what went on in it is cancelled.")},
        404,
        parameters=[THREAD_PATH],
    ),
    ("GET", "/api/chat/threads/{thread_id}/messages"): operation(
        "readMessages",
        "Read a thread, the newest page first",
        told(
            "The messages in the order asked; `next` is the `before` of the page before them.",
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
                "How many at the most: fewer where they are long.",
                {"type": "integer", "minimum": 1, "maximum": MAX_PAGE},
            ),
            query("before", "A message: those before it.", text(format="uuid")),
        ],
    ),
    ("GET", "/api/chat/threads/{thread_id}/events"): operation(
        "followThread",
        "Listen to a thread",
        {
            "200": events(
                "`message.created` and the outcomes of runs, numbered 1, 2, 3 ... Ends with "
                "`stream.closed` when the right to it is lost or the thread is deleted."
            )
        },
        400,
        404,
        429,
        parameters=[
            THREAD_PATH,
            query("after", "The number of the last event seen.", text(pattern="^[0-9]{0,9}$")),
            header("Last-Event-ID", GO_ON, text(pattern="^[0-9]{0,9}$")),
        ],
    ),
    ("GET", "/api/chat/runs/{run_id}"): operation(
        "readRun",
        "What became of a question",
        told("The run.", {"run": RUN_EXAMPLE}, run=ref("Run")),
        404,
        parameters=[RUN_PATH],
    ),
    ("GET", "/api/chat/runs/{run_id}/events"): operation(
        "followRun",
        "Listen to a run",
        {
            "200": events(
                "Status, steps and words as they come, up to the outcome, or to `stream.closed` when "
                "the right to it is lost."
            ),
            "204": answer("The outcome was told already: `after` names it."),
        },
        400,
        404,
        429,
        parameters=[
            RUN_PATH,
            query("after", "The id of the last event seen.", text(pattern=RUN_EVENT)),
            header("Last-Event-ID", GO_ON, text(pattern=RUN_EVENT)),
        ],
    ),
    ("POST", "/api/chat/runs/{run_id}/cancel"): operation(
        "cancelRun",
        "End a run",
        {
            "202": answer(
                "It has ended.",
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
        "Have a run begun anew that failed or was cancelled",
        {
            "202": answer(
                "It begins anew.",
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
        "Which models may be asked",
        told(
            "The catalogue.",
            {"models": ["gpt-4o-mini"], "default": "gpt-4o-mini", "anyModel": True, "echo": False},
            models=many(text()),
            default=text(),
            anyModel={"type": "boolean", "description": "Others may be asked for, too."},
            echo={"type": "boolean", "description": "No model is set up: answers are echoes."},
        ),
    ),
}
