from typing import Any

from django.contrib.auth import get_user_model
from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.db import transaction
from django_otp.plugins.otp_totp.models import TOTPDevice

from console import audit


class Command(BaseCommand):
    help = "Remove the second factor of a user who has lost it."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("username")

    def handle(self, *args: Any, username: str, **options: Any) -> None:
        user = get_user_model().objects.filter(username=username).first()
        if user is None:
            raise CommandError(f"There is no user {username!r}.")
        with transaction.atomic():
            removed, _ = TOTPDevice.objects.filter(user=user).delete()
            if not removed:
                raise CommandError(f"{username} has no second factor.")
            entry = audit.new_entry(
                None, audit.Action.CHANGE, user, result="Second factor removed."
            )
            entry.name = "manage.py totp_reset"
            entry.save()
        self.stdout.write(f"{username} can log in with the password only.")
