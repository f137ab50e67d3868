"""The plain JSON of the chat server: what comes in, and what is told."""

from typing import Any

from rest_framework import serializers

from agents.inbox import Accepted, WhenBusy
from agents.models import Run
from chat.models import MAX_TITLE_LENGTH, Message, Thread


class StringField(serializers.CharField):
    """A JSON string and nothing that merely could be one."""

    def to_internal_value(self, data: Any) -> str:
        if not isinstance(data, str):
            self.fail("invalid")
        return super().to_internal_value(data)


class PolicyField(StringField):
    default_error_messages = {"invalid_choice": f"Not one of {', '.join(WhenBusy)}."}

    def to_internal_value(self, data: Any) -> WhenBusy:
        try:
            return WhenBusy(super().to_internal_value(data))
        except ValueError:
            self.fail("invalid_choice")


class WholeField(serializers.IntegerField):
    """A JSON number without a fraction: 60.0 is 60."""

    def to_internal_value(self, data: Any) -> int:
        whole = isinstance(data, int) or (isinstance(data, float) and data.is_integer())
        if not whole or isinstance(data, bool):
            self.fail("invalid")
        return super().to_internal_value(int(data))


class FlagField(serializers.BooleanField):
    """`true` or `false`, and nothing that merely could be one."""

    def to_internal_value(self, data: Any) -> bool:
        if not isinstance(data, bool):
            self.fail("invalid", input=data)
        return data


class AskSerializer(serializers.Serializer[Any]):
    """Only the shape; agents.inbox has the rules."""

    content = StringField(error_messages={"blank": "Write at least 1 character."})
    model = StringField(required=False, allow_null=True, max_length=100)
    threadId = StringField(required=False, allow_null=True, source="thread_id")  # noqa: N815
    correlationId = StringField(  # noqa: N815
        required=False, allow_null=True, source="correlation_id"
    )
    whenBusy = PolicyField(  # noqa: N815
        required=False, allow_null=True, source="when_busy"
    )
    deadlineSeconds = WholeField(  # noqa: N815
        required=False, allow_null=True, source="deadline_seconds"
    )


class ThreadSerializer(serializers.Serializer[Any]):
    """What its owner may change."""

    title = StringField(required=False, allow_blank=True, max_length=MAX_TITLE_LENGTH)
    archived = FlagField(required=False)


def accepted_json(accepted: Accepted) -> dict[str, Any]:
    return {
        "ok": True,
        "status": "accepted",
        "runId": accepted.run_id,
        "threadId": accepted.thread_id,
        "messageId": accepted.message_id,
        "model": accepted.model,
        "correlationId": accepted.correlation_id,
    }


def thread_json(thread: Thread) -> dict[str, Any]:
    """A thread of `ThreadQuerySet.with_preview()`."""
    return {
        "id": thread.pk,
        "title": thread.title,
        "preview": thread.preview,  # type: ignore[attr-defined]
        "archived": thread.archived_at is not None,
        "createdAt": thread.created_at,
        "updatedAt": thread.updated_at,
    }


def message_json(message: Message) -> dict[str, Any]:
    return {
        "id": message.pk,
        "threadId": message.thread_id,
        "role": message.role,
        "content": message.content,
        "correlationId": message.correlation_id,
        "createdAt": message.created_at,
    }


def usage_json(run: Run) -> dict[str, int]:
    return {
        "promptTokens": run.prompt_tokens,
        "completionTokens": run.completion_tokens,
        "totalTokens": run.prompt_tokens + run.completion_tokens,
    }


def run_json(run: Run) -> dict[str, Any]:
    """A run with `answer` loaded."""
    told = {
        "id": run.pk,
        "threadId": run.thread_id,
        "correlationId": run.correlation_id,
        "status": run.status,
        "model": run.model,
        "usage": usage_json(run),
        "createdAt": run.created_at,
        "updatedAt": run.updated_at,
    }
    if run.deadline_at:
        told["deadlineAt"] = run.deadline_at
    if run.merged_into_id:
        told["mergedInto"] = run.merged_into_id
    if run.answer:
        told["output"] = run.answer.content
    if run.safe_error:
        told |= {"safeError": run.safe_error, "errorCode": run.error_code}
    return told
