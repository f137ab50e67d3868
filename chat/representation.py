"""Runs, threads and messages as JSON: the one place that names the fields of the API.

It does not depend on HTTP, so webhooks can import it; docs/openapi.yaml is derived from its types. An
annotation holds the JSON Schema keywords of a field. Functions and typed dicts, not serializers, which
would be too slow for the frames of streams.
"""

from datetime import datetime
from typing import Annotated, Literal, NotRequired, TypedDict
from uuid import UUID

from agents.inbox import Accepted
from agents.models import Event, Run
from agents.runs.retries import pending_retry
from chat.models import MAX_TITLE_LENGTH, Message, Thread

Id = Annotated[str, {"pattern": "^[A-Za-z0-9_-]{1,64}$"}]
Count = Annotated[int, {"minimum": 0}]
RunStatus = Annotated[str, {"enum": Run.Status.values}]


class UsageJSON(TypedDict):
    promptTokens: Count
    completionTokens: Count
    totalTokens: Count
    estimated: Annotated[
        bool, {"description": "The endpoint reported no tokens for some call: they are estimated."}
    ]


class RunJSON(TypedDict):
    id: Id
    threadId: Id
    correlationId: str
    status: RunStatus
    model: str
    usage: UsageJSON
    createdAt: datetime
    updatedAt: datetime
    output: NotRequired[
        Annotated[str, {"description": "The answer of a completed run, as Markdown."}]
    ]
    finishReason: NotRequired[
        Annotated[
            str,
            {
                "description": "Why the model stopped: `stop`, `length` (the answer was cut off at the "
                "output limit), `content_filter` or `tool_calls`. Absent if unknown."
            },
        ]
    ]
    deadlineAt: NotRequired[datetime]
    mergedInto: NotRequired[
        Annotated[Id, {"description": "The run that answers this run's message as well."}]
    ]
    safeError: NotRequired[
        Annotated[
            str,
            {
                "description": "Why a failed run failed, or why the attempt before `nextAttemptAt` did."
            },
        ]
    ]
    errorCode: NotRequired[Annotated[str, {"description": "Stable error code of `safeError`."}]]
    nextAttemptAt: NotRequired[
        Annotated[
            datetime,
            {
                "description": "When a queued run whose last attempt failed is retried. Only in "
                "`GET /api/chat/runs/<id>`."
            },
        ]
    ]


class ThreadJSON(TypedDict):
    id: Id
    title: Annotated[str, {"maxLength": MAX_TITLE_LENGTH, "description": "Empty if none was set."}]
    preview: Annotated[str, {"description": "The beginning of the first message."}]
    archived: bool
    createdAt: datetime
    updatedAt: datetime


class MessageJSON(TypedDict):
    id: UUID
    threadId: Id
    role: Annotated[str, {"enum": Message.Role.values}]
    content: str
    correlationId: str
    createdAt: datetime


class AcceptedJSON(TypedDict):
    ok: Literal[True]
    status: Literal["accepted"]
    runId: Id
    threadId: Id
    messageId: UUID
    model: str
    correlationId: str


class FinishedJSON(TypedDict):
    """`AcceptedJSON` of a run that finished while the client waited."""

    ok: Literal[True]
    status: RunStatus
    runId: Id
    threadId: Id
    messageId: UUID
    model: str
    correlationId: str
    run: RunJSON


def accepted_json(accepted: Accepted) -> AcceptedJSON:
    return {
        "ok": True,
        "status": "accepted",
        "runId": accepted.run_id,
        "threadId": accepted.thread_id,
        "messageId": accepted.message_id,
        "model": accepted.model,
        "correlationId": accepted.correlation_id,
    }


def finished_json(accepted: Accepted, run: Run) -> FinishedJSON:
    return {**accepted_json(accepted), "status": run.status, "run": run_json(run)}


def thread_json(thread: Thread) -> ThreadJSON:
    """Represent a thread of `ThreadQuerySet.with_preview()`."""
    return {
        "id": thread.pk,
        "title": thread.title,
        "preview": thread.preview,  # type: ignore[attr-defined]
        "archived": thread.archived_at is not None,
        "createdAt": thread.created_at,
        "updatedAt": thread.updated_at,
    }


def message_json(message: Message) -> MessageJSON:
    return {
        "id": message.pk,
        "threadId": message.thread_id,
        "role": message.role,
        "content": message.content,
        "correlationId": message.correlation_id,
        "createdAt": message.created_at,
    }


def usage_json(run: Run) -> UsageJSON:
    return {
        "promptTokens": run.prompt_tokens,
        "completionTokens": run.completion_tokens,
        "totalTokens": run.prompt_tokens + run.completion_tokens,
        "estimated": run.usage_is_estimated,
    }


def run_json(run: Run) -> RunJSON:
    """Represent a run with `answer` loaded."""
    return _run_json(
        run,
        status=run.status,
        correlation_id=run.correlation_id,
        updated_at=run.updated_at,
        output=run.answer.content if run.answer else None,
        error=run.safe_error or None,
        finish_reason=run.finish_reason,
        merged_into=run.merged_into_id,
    )


def run_state_json(run: Run) -> RunJSON:
    """Represent a run with `answer` loaded and with the retry that it waits for."""
    body = run_json(run)
    if retry := pending_retry(run):
        body["safeError"], body["errorCode"] = retry.error, retry.code
        body["nextAttemptAt"] = retry.next_at
    return body


def outcome_json(event: Event) -> RunJSON:
    """Represent the run of an outcome event as of the event."""
    return _run_json(
        event.run,
        status=event.type.rpartition(".")[2],
        correlation_id=event.correlation_id,
        updated_at=event.created_at,
        output=event.payload.get("output"),
        error=event.payload.get("error"),
        finish_reason=event.payload.get("finishReason", ""),
        merged_into=event.payload.get("mergedInto"),
    )


def _run_json(
    run: Run,
    *,
    status: str,
    correlation_id: str,
    updated_at: datetime,
    output: str | None,
    error: str | None,
    finish_reason: str,
    merged_into: str | None,
) -> RunJSON:
    body: RunJSON = {
        "id": run.pk,
        "threadId": run.thread_id,
        "correlationId": correlation_id,
        "status": status,
        "model": run.model,
        "usage": usage_json(run),
        "createdAt": run.created_at,
        "updatedAt": updated_at,
    }
    if run.deadline_at:
        body["deadlineAt"] = run.deadline_at
    if merged_into:
        body["mergedInto"] = merged_into
    if output is not None:
        body["output"] = output
    if finish_reason:
        body["finishReason"] = finish_reason
    if error is not None:
        body["safeError"] = error
        body["errorCode"] = run.error_code
    return body
