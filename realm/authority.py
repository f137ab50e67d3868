"""Rights of one user over another. A user manages only users with no more rights than their own, and
grants or revokes only their own. Rights are sets of permissions; a superuser has all.

Permissions of inactive accounts count too: an account may be activated again.
"""

from collections.abc import Iterable

from django.contrib.auth.models import Group, Permission
from django.db.models import Q, QuerySet

from realm.models import User


def held_by(user: User) -> QuerySet[Permission]:
    """Return the permissions that a user holds, including those of their groups."""
    if user.is_superuser:
        return Permission.objects.all()
    own = Permission.objects.filter(user=user.pk).order_by().values("pk")
    by_group = Permission.objects.filter(group__user=user.pk).order_by().values("pk")
    return Permission.objects.filter(Q(pk__in=own) | Q(pk__in=by_group))


def beyond(user: User) -> QuerySet[Permission]:
    """Return the permissions that a user does not hold."""
    return Permission.objects.exclude(pk__in=held_by(user).order_by().values("pk"))


def outranking(user: User) -> QuerySet[User]:
    """Return the users with a right that `user` does not have."""
    if user.is_superuser:
        return User.objects.none()
    missing = beyond(user).order_by().values("pk")
    of_groups = Group.objects.filter(permissions__in=missing).order_by().values("pk")
    direct = User.objects.filter(user_permissions__in=missing).order_by().values("pk")
    by_group = User.objects.filter(groups__in=of_groups).order_by().values("pk")
    return User.objects.filter(Q(is_superuser=True) | Q(pk__in=direct) | Q(pk__in=by_group))


def grantable_groups(user: User) -> QuerySet[Group]:
    """Return the groups whose members `user` may add and remove."""
    if user.is_superuser:
        return Group.objects.all()
    missing = beyond(user).order_by().values("pk")
    return Group.objects.exclude(pk__in=Group.objects.filter(permissions__in=missing).values("pk"))


def objection(actor: User, target: User) -> str:
    """Return the reason why `actor` may not manage `target`; empty if they may."""
    if not outranking(actor).filter(pk=target.pk).exists():
        return ""
    return (
        f"{target} has rights that you do not have, so you cannot change or delete this account. "
        "Ask an administrator who has all of them."
    )


def group_objection(actor: User, group: Group) -> str:
    """Return the reason why `actor` may not change or delete `group`; empty if they may."""
    if actor.is_superuser:
        return ""
    if not grantable_groups(actor).filter(pk=group.pk).exists():
        return f"The group {group} has permissions that you do not hold, so you cannot change it."
    if outranking(actor).filter(groups=group).exists():
        return f"A member of the group {group} has more rights than you, so you cannot change it."
    return ""


def not_grantable(allowed: QuerySet[Group] | QuerySet[Permission], ids: Iterable[str]) -> bool:
    """Return True if one of the submitted ids is not allowed."""
    keys = {int(each) for each in ids if each.isascii() and each.isdigit() and len(each) < 19}
    return bool(keys - set(allowed.filter(pk__in=keys).values_list("pk", flat=True)))
