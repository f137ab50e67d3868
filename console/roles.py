"""The groups Viewer, Operator and Admin, and the permissions that `migrate` grants them.

A signal handler and not a migration: Django creates permissions after all migrations, and a later page
becomes visible to viewers without another step.
"""

from typing import Any

from django.apps import AppConfig
from django.apps.registry import Apps
from django.apps.registry import apps as global_apps
from django.contrib.auth.management import create_permissions

VIEWER, OPERATOR, ADMIN = "Viewer", "Operator", "Admin"
# Viewers see the models of these apps. Models of libraries (logins, devices) are for admins.
APPS = {"realm", "chat", "agents", "botrunner", "webhooks", "console", "ops"}
# No user and no admin page needs their permissions.
INTERNAL = {"contenttypes", "sessions", "admin"}
ADMIN_ONLY = {"console.view_auditentry", "console.view_rolegrant"}
OPERATOR_PERMISSIONS = {
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
    """Return the groups that get a permission, written as `agents.cancel_run`."""
    app, _, codename = permission.partition(".")
    if app in INTERNAL:
        return []
    if permission in OPERATOR_PERMISSIONS:
        return [OPERATOR, ADMIN]
    if app in APPS and codename.startswith("view_") and permission not in ADMIN_ONLY:
        return [VIEWER, OPERATOR, ADMIN]
    return [ADMIN]


def grant(sender: AppConfig, using: str, apps: Apps = global_apps, **_: Any) -> None:
    """Grant the groups the permissions of an app that they have not been granted before. Runs after
    `migrate`."""
    # Receivers run in the order of INSTALLED_APPS: auth has not created the permissions yet.
    create_permissions(sender, verbosity=0, using=using, apps=apps)
    try:
        Permission = apps.get_model("auth", "Permission")
        Group = apps.get_model("auth", "Group")
        RoleGrant = apps.get_model("console", "RoleGrant")
    except LookupError:
        return  # migrated back to a state without them
    permissions = {
        f"{sender.label}.{permission.codename}": permission
        for permission in Permission.objects.using(using).filter(
            content_type__app_label=sender.label
        )
    }
    granted = set(
        RoleGrant.objects.using(using)
        .filter(permission__startswith=f"{sender.label}.")
        .values_list("group", "permission")
    )
    for role in (VIEWER, OPERATOR, ADMIN):
        missing = {
            name: permission
            for name, permission in permissions.items()
            if role in roles_with(name) and (role, name) not in granted
        }
        if not missing:
            continue
        group = Group.objects.using(using).get_or_create(name=role)[0]
        group.permissions.add(*missing.values())
        RoleGrant.objects.using(using).bulk_create(
            [RoleGrant(group=role, permission=name) for name in missing], ignore_conflicts=True
        )
