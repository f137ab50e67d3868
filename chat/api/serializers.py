"""Request bodies of the chat API (plain JSON)."""

from typing import Any

from rest_framework import serializers

from agents.inbox import WhenBusy
from chat.models import MAX_TITLE_LENGTH


class JSONStringField(serializers.CharField):
    """A JSON string; other types are not converted."""

    def to_internal_value(self, data: Any) -> str:
        if not isinstance(data, str):
            self.fail("invalid")
        return super().to_internal_value(data)


class PolicyField(JSONStringField):
    default_error_messages = {"invalid_choice": f"Not one of {', '.join(WhenBusy)}."}

    def to_internal_value(self, data: Any) -> WhenBusy:
        try:
            return WhenBusy(super().to_internal_value(data))
        except ValueError:
            self.fail("invalid_choice")


class WholeNumberField(serializers.IntegerField):
    """A whole JSON number, 60.0 included."""

    def to_internal_value(self, data: Any) -> int:
        whole = isinstance(data, int) or (isinstance(data, float) and data.is_integer())
        if not whole or isinstance(data, bool):
            self.fail("invalid")
        return super().to_internal_value(int(data))


class FlagField(serializers.BooleanField):
    """`true` or `false`; other types are not converted."""

    def to_internal_value(self, data: Any) -> bool:
        if not isinstance(data, bool):
            self.fail("invalid", input=data)
        return data


class MessageRequestSerializer(serializers.Serializer[Any]):
    """The shape of a submitted message; agents.inbox enforces the rules."""

    content = JSONStringField(error_messages={"blank": "Write at least 1 character."})
    model = JSONStringField(required=False, allow_null=True, max_length=100)
    threadId = JSONStringField(required=False, allow_null=True, source="thread_id")  # noqa: N815
    correlationId = JSONStringField(  # noqa: N815
        required=False, allow_null=True, source="correlation_id"
    )
    whenBusy = PolicyField(  # noqa: N815
        required=False, allow_null=True, source="when_busy"
    )
    deadlineSeconds = WholeNumberField(  # noqa: N815
        required=False, allow_null=True, source="deadline_seconds"
    )


class ThreadChangeSerializer(serializers.Serializer[Any]):
    title = JSONStringField(required=False, allow_blank=True, max_length=MAX_TITLE_LENGTH)
    archived = FlagField(required=False)
