from typing import Any

from django.apps import AppConfig
from django.contrib.auth.signals import user_logged_out
from django.db.models.signals import post_delete, post_save

from lib import revocations


class RealmConfig(AppConfig):
    name = "realm"

    def ready(self) -> None:
        user = self.get_model("User")
        post_save.connect(_user_saved, user, dispatch_uid="realm.saved")
        post_delete.connect(_user_deleted, user, dispatch_uid="realm.deleted")
        user_logged_out.connect(_user_logged_out, dispatch_uid="realm.logged_out")


def _user_saved(
    sender: Any, instance: Any, created: bool, update_fields: frozenset[str] | None, **_: Any
) -> None:
    if not created and (update_fields is None or sender.RIGHTS & update_fields):
        revocations.publish_on_commit(user=instance.pk)


def _user_deleted(sender: Any, instance: Any, **_: Any) -> None:
    revocations.publish_on_commit(user=instance.pk)


def _user_logged_out(sender: Any, user: Any, **_: Any) -> None:
    if user is not None:
        revocations.publish_on_commit(user=user.pk)
