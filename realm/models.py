import re
import uuid
from collections.abc import Iterable
from datetime import timedelta
from typing import Any, ClassVar

from django.contrib.auth.hashers import make_password
from django.contrib.auth.models import AbstractUser, UserManager
from django.core.exceptions import ValidationError
from django.core.validators import RegexValidator
from django.db import IntegrityError, models
from django.db.models import F, Q
from django.utils import timezone

from lib import db, revocations
from realm.filters import EVENT_TYPES, MATRIX_EVENT, EventFilter, InvalidFilter

# https://spec.matrix.org/v1.11/appendices/#user-identifiers, historical localparts included.
# Anchored, because a validator searches: it would restart at each @.
MATRIX_USER_ID = re.compile(r"\A@[\x21-\x39\x3b-\x7e]{1,}:[A-Za-z0-9.\-\[\]:]{1,}\Z")
MAX_MATRIX_ID_LENGTH = 255
# Registrations, and commands, of one user: each message is matched with all of its sender's.
MAX_EACH = 100


class NameTaken(Exception):
    """Another account has this Matrix id as its username; the message is safe to show."""


class UserQuerySet(models.QuerySet["User"]):
    def update(self, **columns: Any) -> int:
        """Update, and publish that rights may be revoked: of any user, because the rows are unknown."""
        if User.RIGHTS & columns.keys():
            revocations.publish_on_commit()
        return super().update(**columns)


class RealmUserManager(UserManager["User"]):
    def get_queryset(self) -> UserQuerySet:
        return UserQuerySet(self.model, using=self._db)

    def create_matrix_user(self, matrix_user_id: str) -> "User":
        """Create a user without a password, who can sign in only with a realm token."""
        return self.create_user(username=matrix_user_id, matrix_user_id=matrix_user_id)

    def of_matrix_id(self, matrix_user_id: str) -> "User":
        """Return the user with that Matrix id, created if unknown. Earlier tokens belong to a deleted
        account and are not valid for this one. Raises `NameTaken`."""
        try:
            user, _ = self.get_or_create(
                matrix_user_id=matrix_user_id,
                defaults={
                    "username": matrix_user_id,
                    "password": make_password(None),
                    "tokens_valid_from": timezone.now().replace(microsecond=0),
                },
            )
        except IntegrityError as error:
            if not db.is_duplicate(error, User, "username"):
                raise
            raise NameTaken(
                f"{matrix_user_id} is the username of an account without this Matrix id."
            ) from None
        return user

    def deactivated_among(self, matrix_user_ids: Iterable[str]) -> set[str]:
        """Return the Matrix ids of deactivated accounts among those given."""
        users = self.filter(matrix_user_id__in=set(matrix_user_ids), is_active=False)
        return {str(each) for each in users.values_list("matrix_user_id", flat=True)}


class User(AbstractUser):
    # A Matrix id may be that long.
    username = models.CharField(max_length=MAX_MATRIX_ID_LENGTH, unique=True)
    matrix_user_id = models.CharField(
        "Matrix user id",
        max_length=MAX_MATRIX_ID_LENGTH,
        unique=True,
        null=True,
        blank=True,
        validators=[RegexValidator(MATRIX_USER_ID, "Write it as @user:server.")],
    )
    # A whole second, as a token's `iat` is. Changed by revoke_tokens().
    tokens_valid_from = models.DateTimeField(
        "API tokens valid from",
        null=True,
        editable=False,
        help_text="The API tokens that were issued before are revoked.",
    )

    objects: ClassVar[RealmUserManager] = RealmUserManager()

    # A change of these may end open streams (realm.access).
    RIGHTS = frozenset({"is_active", "password", "tokens_valid_from", "matrix_user_id"})

    def revoke_tokens(self) -> None:
        """Revoke all realm tokens of the user, those of this second included: new tokens are issued for
        the next second or later."""
        moment = timezone.now().replace(microsecond=0) + timedelta(seconds=1)
        me = User.objects.filter(pk=self.pk)
        earlier = Q(tokens_valid_from=None) | Q(tokens_valid_from__lt=moment)
        if not me.filter(earlier).update(tokens_valid_from=moment):
            # Revoked in this second already; a token issued since then has that time.
            me.update(tokens_valid_from=F("tokens_valid_from") + timedelta(seconds=1))
        self.refresh_from_db(fields=["tokens_valid_from"])


class BotRegistrationQuerySet(models.QuerySet["BotRegistration"]):
    def of(self, user: User) -> "BotRegistrationQuerySet":
        return self.filter(user_id=user.pk)

    def enable(self) -> int:
        """Enable the bots; return the number that was disabled."""
        return self.filter(enabled=False).update(enabled=True, disabled_at=None, disabled_reason="")

    def disable(self, reason: str = "") -> int:
        """Disable the bots for new and unhandled events; runs continue. Return the number that was
        enabled."""
        return self.filter(enabled=True).update(
            enabled=False, disabled_at=timezone.now(), disabled_reason=reason
        )


class BotRegistration(models.Model):
    """The permission of a bot to act for a user. It creates no Matrix account."""

    id = models.UUIDField(primary_key=True, default=uuid.uuid4, editable=False)
    user = models.ForeignKey(User, models.CASCADE, related_name="bot_registrations")
    username = models.CharField(
        "Matrix user id",
        max_length=MAX_MATRIX_ID_LENGTH,
        editable=False,
        help_text="The user's at the time of the registration.",
    )
    # Changed by enable() and disable(), which keep the three together.
    enabled = models.BooleanField(
        default=True, editable=False, help_text="While it is not, it fires nothing."
    )
    disabled_at = models.DateTimeField(null=True, blank=True, editable=False)
    disabled_reason = models.TextField(blank=True, editable=False)
    created_at = models.DateTimeField(default=timezone.now, editable=False)

    objects = BotRegistrationQuerySet.as_manager()

    class Meta:
        ordering = ["created_at", "id"]
        permissions = [("switch_botregistration", "Can enable and disable bot registrations")]
        indexes = [
            # botrunner.incoming.matching: by the sender of an event.
            models.Index(fields=["username"], name="bot_registration_by_username"),
        ]
        constraints = [
            models.CheckConstraint(
                condition=Q(username__startswith="@"), name="bot_registration_is_for_a_matrix_id"
            ),
            models.CheckConstraint(
                condition=Q(enabled=True, disabled_at=None, disabled_reason="")
                | Q(enabled=False, disabled_at__isnull=False),
                name="bot_registration_is_enabled_or_says_since_when_not",
            ),
        ]

    def __str__(self) -> str:
        return f"{self.username} ({self.pk})"


class BotCommandQuerySet(models.QuerySet["BotCommand"]):
    def of(self, user: User) -> "BotCommandQuerySet":
        return self.filter(registration__user_id=user.pk)


class BotCommand(models.Model):
    """A command that a registered bot runs for each event that matches the filter."""

    id = models.UUIDField(primary_key=True, default=uuid.uuid4, editable=False)
    registration = models.ForeignKey(BotRegistration, models.CASCADE, related_name="commands")
    command = models.CharField(max_length=2000)
    # Read it through `when`.
    filter = models.JSONField(
        help_text=f'{{"type": "{MATRIX_EVENT}", "event_type": "{EVENT_TYPES[0]}" or '
        f'"{EVENT_TYPES[1]}", "content_type": "..."}}; optional: "prefix", "mention".'
    )
    created_at = models.DateTimeField(default=timezone.now, editable=False)

    objects = BotCommandQuerySet.as_manager()

    class Meta:
        ordering = ["created_at", "id"]
        constraints = [
            models.CheckConstraint(condition=~Q(command=""), name="bot_command_fires_something"),
            models.CheckConstraint(
                condition=Q(filter__type=MATRIX_EVENT) & Q(filter__event_type__in=EVENT_TYPES),
                name="bot_command_filter_is_known",
            ),
        ]

    def __str__(self) -> str:
        return self.command

    def clean(self) -> None:
        try:
            EventFilter.parse(self.filter).check_readable()
        except InvalidFilter as error:
            raise ValidationError({"filter": str(error)}) from None

    @property
    def when(self) -> EventFilter:
        return EventFilter.parse(self.filter)

    def in_words(self) -> str:
        """Describe the events that run the command."""
        try:
            return self.when.in_words()
        except InvalidFilter as error:
            return f"never: {error}"
