from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser

from realm import tokens
from realm.models import MATRIX_USER_ID, MAX_MATRIX_ID_LENGTH, NameTaken, User


class Command(BaseCommand):
    help = "Print a realm-server JWT for a Matrix user, for scripts."
    requires_system_checks: list[str] = []  # their warnings would end up in $(...)

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("user", help="a Matrix id, @user:server")
        parser.add_argument("--create", action="store_true", help="create the user if unknown")
        parser.add_argument(
            "--hours", type=int, default=168, help="how long it is good for (at most 168)"
        )

    def handle(self, *args: Any, user: str, create: bool, hours: int, **options: Any) -> None:
        if not MATRIX_USER_ID.match(user) or len(user) > MAX_MATRIX_ID_LENGTH:
            raise CommandError(f"{user!r} is not a Matrix id: write it as @user:server.")
        if not 1 <= hours <= 168:
            raise CommandError("--hours is from 1 to 168.")
        if not User.objects.filter(matrix_user_id=user).exists():
            if not create:
                raise CommandError(f"{user} is not known here. Add --create to create the user.")
            try:
                User.objects.of_matrix_id(user)
            except NameTaken as error:
                raise CommandError(str(error)) from None
        self.stdout.write(tokens.issue(user, max_age=hours * 3600))
