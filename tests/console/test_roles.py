from collections.abc import Callable
from typing import Any

import pytest
from django.apps import apps
from django.contrib.auth.models import Group, Permission
from django.core.management import call_command
from django.test import Client

from console import roles

SignIn = Callable[..., Client]
pytestmark = pytest.mark.django_db


def held_by(role: str) -> set[str]:
    return {
        f"{app}.{codename}"
        for app, codename in Group.objects.get(name=role).permissions.values_list(
            "content_type__app_label", "codename"
        )
    }


def test_migrate_makes_the_groups() -> None:
    viewer, operator, admin = map(held_by, (roles.VIEWER, roles.OPERATOR, roles.ADMIN))

    assert viewer < operator < admin
    assert operator - viewer == roles.OPERATOR_PERMISSIONS
    assert all(".view_" in permission for permission in viewer)
    assert "console.view_auditentry" in admin - operator
    assert {"realm.add_botregistration", "realm.change_user"} <= admin


def test_every_permission_that_operators_get_is_one() -> None:
    known = {
        f"{app}.{codename}"
        for app, codename in Permission.objects.values_list("content_type__app_label", "codename")
    }

    assert known >= roles.OPERATOR_PERMISSIONS


def test_what_an_admin_changed_in_a_group_stays() -> None:
    viewer = Group.objects.get(name=roles.VIEWER)
    viewer.permissions.remove(Permission.objects.get(codename="view_run"))
    viewer.permissions.add(Permission.objects.get(codename="read_messages"))
    Group.objects.get(name=roles.OPERATOR).delete()

    call_command("migrate", verbosity=0)

    assert "agents.view_run" not in held_by(roles.VIEWER)
    assert "chat.read_messages" in held_by(roles.VIEWER)
    assert not Group.objects.filter(name=roles.OPERATOR).exists()


def test_a_new_permission_reaches_the_groups() -> None:
    config = apps.get_app_config("chat")
    Permission.objects.get(codename="view_thread").delete()
    apps.get_model("console", "RoleGrant").objects.filter(permission="chat.view_thread").delete()

    roles.grant(config, using="default", apps=apps)

    for role in (roles.VIEWER, roles.OPERATOR, roles.ADMIN):
        assert "chat.view_thread" in held_by(role)


def test_migrating_back_to_before_the_groups_works(transactional_db: Any) -> None:
    call_command("migrate", "console", "zero", verbosity=0)
    call_command("migrate", "console", verbosity=0)

    assert held_by(roles.OPERATOR) >= roles.OPERATOR_PERMISSIONS


@pytest.mark.parametrize(
    "lookup",
    [
        "chat/message/?content__startswith=S",
        "chat/thread/?summary__startswith=S",
        "agents/run/?input__roomId__startswith=S",
        "agents/run/?message__content__startswith=S",
        "agents/event/?payload__prompt__startswith=S",
        "agents/summary/?text__startswith=S",
        "botrunner/roomevent/?source__content__body__startswith=S",
        "botrunner/reply/?parts__0__body__startswith=S",
        "botrunner/session/?access_token__startswith=s",
        "webhooks/subscription/?secret__startswith=w",
        "webhooks/subscription/?old_secret__startswith=w",
        "webhooks/subscription/?url__startswith=h",
        "webhooks/delivery/?event__body__startswith=S",
        "webhooks/delivery/?subscription__secret__startswith=w",
        "realm/user/?password__startswith=m",
    ],
)
def test_what_is_hidden_cannot_be_guessed_by_filters(sign_in: SignIn, lookup: str) -> None:
    assert sign_in(roles.ADMIN).get(f"/admin/{lookup}").status_code == 400
