import re
from typing import ClassVar

from django.contrib.auth.models import AbstractUser, UserManager
from django.core.validators import RegexValidator
from django.db import models

# https://spec.matrix.org/v1.11/appendices/#user-identifiers, historical localparts included.
MATRIX_USER_ID = re.compile(r"@[\x21-\x39\x3b-\x7e]{1,}:[A-Za-z0-9.\-\[\]:]{1,}\Z")


class RealmUserManager(UserManager["User"]):
    def create_matrix_user(self, matrix_user_id: str) -> "User":
        """A user known by a Matrix id alone: no password, so no way in but a realm token."""
        return self.create_user(username=matrix_user_id, matrix_user_id=matrix_user_id)


class User(AbstractUser):
    username = models.CharField(max_length=255, unique=True)  # a Matrix id may be that long
    matrix_user_id = models.CharField(
        "Matrix user id",
        max_length=255,
        unique=True,
        null=True,
        blank=True,
        validators=[RegexValidator(MATRIX_USER_ID, "Write it as @user:server.")],
    )

    objects: ClassVar[RealmUserManager] = RealmUserManager()
