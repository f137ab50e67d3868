"""Request bodies of the chat API (plain JSON)."""

from chat.fields import FlagField, JSONStringField, PolicyField, WholeNumberField
from chat.models import MAX_TITLE_LENGTH
from lib.plainjson import StrictSerializer


class MessageRequestSerializer(StrictSerializer):
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


class ThreadChangeSerializer(StrictSerializer):
    title = JSONStringField(required=False, allow_blank=True, max_length=MAX_TITLE_LENGTH)
    archived = FlagField(required=False)
