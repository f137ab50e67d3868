"""Fields of request bodies, strict about JSON types."""

from typing import Any

from rest_framework import serializers

from agents.inbox import WhenBusy


class JSONStringField(serializers.CharField):
    """A JSON string; other types are not converted."""

    def to_internal_value(self, data: Any) -> str:
        if not isinstance(data, str):
            self.fail("invalid")
        return super().to_internal_value(data)


class PolicyField(JSONStringField):
    default_error_messages = {"invalid_choice": f"Must be one of {', '.join(WhenBusy)}."}

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
