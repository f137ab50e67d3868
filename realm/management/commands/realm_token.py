from typing import Any

from django.conf import settings
from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.db import transaction

from realm import audit, tokens
from realm.models import MATRIX_USER_ID, MAX_MATRIX_ID_LENGTH, NameTaken, User


class Command(BaseCommand):
    help = "Print a realm-server JWT for a Matrix user, for scripts; or revoke all of theirs."
    requires_system_checks: list[str] = []  # their warnings would become part of $(...)

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("user", help="a Matrix id, @user:server")
        way = parser.add_mutually_exclusive_group()
        way.add_argument("--create", action="store_true", help="create the user if unknown")
        way.add_argument(
            "--revoke",
            action="store_true",
            help="revoke all tokens of the user, and print none",
        )
        parser.add_argument(
            "--hours", type=int, default=168, help="the lifetime of the token (at most 168)"
        )

    def handle(
        self, *args: Any, user: str, create: bool, revoke: bool, hours: int, **options: Any
    ) -> None:
        if not MATRIX_USER_ID.match(user) or len(user) > MAX_MATRIX_ID_LENGTH:
            raise CommandError(f"{user!r} is not a Matrix id: write it as @user:server.")
        if not 1 <= hours <= 168:
            raise CommandError("--hours must be from 1 to 168.")
        known_user = User.objects.filter(matrix_user_id=user).first()
        if revoke:
            self._revoke(user, known_user)
            return
        if "REALM_SECRET_SEED" in settings.UNUSED_SECRETS:
            raise CommandError(
                "REALM_SECRET_SEED is unused here. Print tokens where the web server runs."
            )
        if known_user is None:
            if not create:
                raise CommandError(f"{user} is unknown. Add --create to create the user.")
            try:
                known_user = User.objects.of_matrix_id(user)
            except NameTaken as error:
                raise CommandError(str(error)) from None
        self.stdout.write(
            tokens.issue(user, max_age=hours * 3600, valid_from=known_user.tokens_valid_from)
        )

    def _revoke(self, name: str, user: User | None) -> None:
        if user is None:
            raise CommandError(f"{name} is unknown, so no token of theirs is valid.")
        with transaction.atomic():
            user.revoke_tokens()
            audit.record(user, "All API tokens revoked.", "manage.py realm_token")
        self.stdout.write(
            f"All tokens of {name} are revoked. Without --revoke this command prints a new one."
        )
