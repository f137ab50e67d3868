"""The groups Viewer, Operator and Admin, and what `migrate` gives to them.

By a signal of `migrate` and not by a migration: Django creates permissions after all migrations, and a
page that is added later shall be seen by viewers without anybody thinking of it.
"""

from typing import Any

from django.apps import AppConfig
from django.apps.registry import Apps
from django.apps.registry import apps as global_apps
from django.contrib.auth.management import create_permissions

VIEWER, OPERATOR, ADMIN = "Viewer", "Operator", "Admin"
# Viewers see what these hold. What libraries bring (log-ins, devices) is for admins.
OURS = {"realm", "chat", "agents", "botrunner", "webhooks", "console", "ops"}
# Neither people nor pages of the admin need them.
INTERNAL = {"contenttypes", "sessions", "admin"}
FOR_ADMINS = {"console.view_auditentry", "console.view_rolegrant"}
OPERATES = {
    "chat.read_messages",
    "agents.cancel_run",
    "agents.retry_run",
    "agents.requeue_run",
    "agents.replay_event",
    "botrunner.resend_reply",
    "webhooks.resend_delivery",
    "webhooks.switch_subscription",
    "realm.switch_botregistration",
    "console.export_rows",
    "console.see_system",
}


def roles_with(permission: str) -> list[str]:
    """The groups that get a permission, written as `agents.cancel_run`."""
    app, _, codename = permission.partition(".")
    if app in INTERNAL:
        return []
    if permission in OPERATES:
        return [OPERATOR, ADMIN]
    if app in OURS and codename.startswith("view_") and permission not in FOR_ADMINS:
        return [VIEWER, OPERATOR, ADMIN]
    return [ADMIN]


def grant(sender: AppConfig, using: str, apps: Apps = global_apps, **_: Any) -> None:
    """Give the groups what they have not been given yet of an app's permissions; after `migrate`."""
    # Receivers run in the order of INSTALLED_APPS, so auth has not made them yet.
    create_permissions(sender, verbosity=0, using=using, apps=apps)
    try:
        Permission = apps.get_model("auth", "Permission")
        Group = apps.get_model("auth", "Group")
        RoleGrant = apps.get_model("console", "RoleGrant")
    except LookupError:
        return  # migrated back to before they were there
    permissions = {
        f"{sender.label}.{permission.codename}": permission
        for permission in Permission.objects.using(using).filter(
            content_type__app_label=sender.label
        )
    }
    given = set(
        RoleGrant.objects.using(using)
        .filter(permission__startswith=f"{sender.label}.")
        .values_list("group", "permission")
    )
    for role in (VIEWER, OPERATOR, ADMIN):
        news = {
            name: permission
            for name, permission in permissions.items()
            if role in roles_with(name) and (role, name) not in given
        }
        if not news:
            continue
        group = Group.objects.using(using).get_or_create(name=role)[0]
        group.permissions.add(*news.values())
        RoleGrant.objects.using(using).bulk_create(
            [RoleGrant(group=role, permission=name) for name in news], ignore_conflicts=True
        )
