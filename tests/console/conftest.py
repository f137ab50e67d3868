from collections.abc import Callable

import pytest
from django.contrib.auth.models import Group
from django.test import Client

from realm.models import User


@pytest.fixture
def sign_in() -> Callable[[str], Client]:
    """A browser of somebody who is in that group and no superuser; `user` is its account."""

    def signed_in(role: str, name: str = "") -> Client:
        user = User.objects.create_user(name or role.lower() or "nobody", is_staff=True)
        if role:
            user.groups.add(Group.objects.get(name=role))
        client = Client()
        client.force_login(user)
        client.user = user  # type: ignore[attr-defined]
        return client

    return signed_in
