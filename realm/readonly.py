from typing import Any

from django.http import HttpRequest


class ReadOnly:
    """What the system writes, nobody edits."""

    def has_add_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False

    def get_readonly_fields(self, request: HttpRequest, obj: Any = None) -> list[Any]:
        # Django builds a form even where nothing may be changed, and cannot put every field in one.
        return list(getattr(self, "fields", None) or ())
