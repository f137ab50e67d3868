"""A hook for the audit trail: changes that are made without a request. The console sets `record`."""

from collections.abc import Callable

from django.db.models import Model


def _discard(row: Model, result: str, program: str) -> None:
    pass


# Called in the transaction of a change, with the changed row, the result and the program's name.
record: Callable[[Model, str, str], None] = _discard
