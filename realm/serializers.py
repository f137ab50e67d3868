"""The documents of the realm server, and the checks of their owner."""

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from django.db.models import QuerySet
from rest_framework.fields import Field, UUIDField
from rest_framework_json_api import serializers

from lib.httperrors import Conflict, Forbidden, NotFound
from lib.jsonapi.documents import StringField
from realm import commands, models, openid, tokens
from realm.filters import EventFilter, InvalidFilter
from realm.models import BotCommand, BotRegistration, User


@dataclass(frozen=True)
class ServerSession:
    """A realm-server JWT and its claims. It is not stored."""

    pk: str
    user: str
    token: str
    expires_at: datetime

    @classmethod
    def of(cls, user: User) -> "ServerSession":
        name = str(user.matrix_user_id)
        token = tokens.issue(name, valid_from=user.tokens_valid_from)
        expires = datetime.fromtimestamp(tokens.verify(token).expires, UTC)
        return cls(pk=name, user=name, token=token, expires_at=expires)


class ServerSessionSerializer(serializers.Serializer):
    access_token = StringField(write_only=True, max_length=openid.MAX_TOKEN_LENGTH)
    user = serializers.CharField(read_only=True)
    token = serializers.CharField(read_only=True)
    expires_at = serializers.DateTimeField(read_only=True)

    class Meta:
        resource_name = "server-session"


class BotRegistrationSerializer(serializers.ModelSerializer):
    username = StringField()

    class Meta:
        model = BotRegistration
        resource_name = "bot-registration"
        fields = ["username", "enabled", "created_at"]
        read_only_fields = ["enabled"]

    def validate_username(self, username: str) -> str:
        if username != self.context["request"].user.matrix_user_id:
            raise Forbidden(
                "The username must be the Matrix id of the token's user.",
                pointer="/data/attributes/username",
            )
        return username

    def validate(self, attrs: Any) -> Any:
        _check_number(BotRegistration.objects.of(self.context["request"].user), "bots")
        return attrs


class IdField(UUIDField):
    """A UUID in a string; DRF also accepts a number."""

    def to_internal_value(self, data: Any) -> UUID:
        if not isinstance(data, str):
            self.fail("invalid")
        return super().to_internal_value(data)


class FilterField(Field[Any, Any, Any, Any]):
    """An event filter, validated as a whole and stored as sent."""

    def to_internal_value(self, data: Any) -> Any:
        try:
            EventFilter.parse(data).check_readable()
        except InvalidFilter as error:
            message = error.message
            raise serializers.ValidationError(
                {error.key: message} if error.key else message
            ) from None
        return data

    def to_representation(self, value: Any) -> Any:
        return value


class BotCommandSerializer(serializers.ModelSerializer):
    bot_id = IdField(source="registration_id")
    command = StringField(max_length=BotCommand._meta.get_field("command").max_length)
    filter = FilterField()

    class Meta:
        model = BotCommand
        resource_name = "bot-command"
        fields = ["bot_id", "command", "filter", "created_at"]

    def validate_command(self, command: str) -> str:
        try:
            commands.check(command)
        except commands.UnknownCommand as error:
            raise serializers.ValidationError(str(error), "unknown_command") from None
        return command

    def validate_bot_id(self, bot_id: UUID) -> UUID:
        check_owner(bot_id, self.context["request"].user, pointer="/data/attributes/botId")
        return bot_id

    def validate(self, attrs: Any) -> Any:
        _check_number(BotCommand.objects.of(self.context["request"].user), "commands")
        return attrs


def _check_number(rows: QuerySet[Any], name: str) -> None:
    if rows.count() >= models.MAX_EACH:
        raise Conflict(f"A user may have at most {models.MAX_EACH} {name}. Delete one first.")


def check_owner(bot_id: UUID, user: User, **source: str) -> None:
    """Raise 404 for an unknown bot, 403 for that of another user; `source` names its place."""
    owner = BotRegistration.objects.filter(pk=bot_id).values_list("user_id", flat=True).first()
    if owner is None:
        raise NotFound("There is no registered bot with this id.", **source)
    if owner != user.pk:
        raise Forbidden("This bot is registered by another user.", **source)
