"""JSON:API serializers of subscriptions, for their owners."""

from typing import Any
from uuid import UUID

from django.core.exceptions import ValidationError as Invalid
from django.db import IntegrityError, transaction
from rest_framework.serializers import as_serializer_error
from rest_framework_json_api import serializers

from lib import db
from lib.httperrors import Conflict
from lib.jsonapi.documents import StringField
from realm.serializers import IdField, check_owner
from webhooks.models import EVENTS, Duplicate, Subscription

# The fields of the constraints on the owner's webhooks.
UNIQUE = (("owner", "url"), ("owner", "url", "registration"))


class SubscriptionSerializer(serializers.ModelSerializer):
    url = StringField(max_length=Subscription._meta.get_field("url").max_length)
    bot_id = IdField(source="registration_id", required=False, allow_null=True)
    events = serializers.ListField(
        child=serializers.ChoiceField(choices=list(EVENTS)), allow_empty=False, required=False
    )

    class Meta:
        model = Subscription
        resource_name = "webhook-subscription"
        fields = ["url", "bot_id", "events", "enabled", "disabled_reason", "created_at"]
        read_only_fields = ["enabled", "disabled_reason"]

    def validate_bot_id(self, bot_id: UUID | None) -> UUID | None:
        if bot_id:
            check_owner(bot_id, self.context["request"].user, pointer="/data/attributes/botId")
        return bot_id

    def create(self, validated_data: dict[str, Any]) -> Subscription:
        events = validated_data.pop("events", EVENTS)
        columns = {column: name in events for name, column in EVENTS.items()}
        subscription = Subscription(**validated_data, **columns)
        try:
            with transaction.atomic():
                subscription.clean()
                subscription.save(force_insert=True)
        except Duplicate as error:
            raise Conflict(error.messages[0], pointer="/data/attributes/url") from None
        except Invalid as error:
            raise serializers.ValidationError(as_serializer_error(error)) from None
        except IntegrityError as error:
            # Another request was first, on a database without row locks.
            if not any(db.is_duplicate(error, Subscription, *fields) for fields in UNIQUE):
                raise
            raise Conflict("Another request just added the same webhook.") from None
        return subscription


class NewSubscriptionSerializer(SubscriptionSerializer):
    """The response to creation, with the secret, which is shown only once."""

    class Meta(SubscriptionSerializer.Meta):
        fields = [*SubscriptionSerializer.Meta.fields, "secret"]
        read_only_fields = [*SubscriptionSerializer.Meta.read_only_fields, "secret"]
