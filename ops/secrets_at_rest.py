"""All secrets that are stored, in the database and in the bot's store: which key they are encrypted
under, and their encryption under the newest one (lib/secrets.py)."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from django.conf import settings
from django.db import transaction

from botrunner.matrix import seeds
from lib import secrets
from lib.secrets import EncryptedTextField, Sealed, Unreadable

logger = logging.getLogger(__name__)

BATCH = 500


@dataclass
class Count:
    """How many there are, by what they are encrypted under."""

    total: int = 0
    outdated: int = 0  # not under the newest key, the unreadable ones left out
    unreadable: int = 0
    rotated: int = 0


def count() -> Count:
    """Read every secret; nothing is changed."""
    found = Count()
    for field in secrets.fields():
        for row in _rows(field):
            _look(found, row.sealed, field.purpose, row.place)
    for path in seeds.files(settings.BOT_RUNNER_STORE):
        _look(found, seeds.stored(path), seeds.PURPOSE, [seeds.user_of(path)])
    return found


def rotate() -> Count:
    """Encrypt under the newest key what is not. A row that changes meanwhile is left alone: the
    change has encrypted it under the newest key. What cannot be read stays as it is."""
    found = Count()
    for field in secrets.fields():
        for row in _rows(field):
            if _look(found, row.sealed, field.purpose, row.place):
                found.rotated += _renew(field, row)
    for path in seeds.files(settings.BOT_RUNNER_STORE):
        if _look(found, seeds.stored(path), seeds.PURPOSE, [seeds.user_of(path)]):
            found.rotated += seeds.renew(path)
    return found


@dataclass(frozen=True)
class _Row:
    pk: Any
    sealed: Sealed
    place: list[Any]


def _look(found: Count, sealed: Sealed, purpose: str, place: list[Any]) -> bool:
    """Count one. Whether it has to be encrypted anew, and can be."""
    found.total += 1
    try:
        secrets.unseal(sealed, purpose, *place)
    except Unreadable as error:
        found.unreadable += 1
        logger.warning("%s (%s)", error, ", ".join(map(str, place)))
        return False
    if secrets.is_current(sealed):
        return False
    found.outdated += 1
    return True


def _rows(field: EncryptedTextField) -> Iterator[_Row]:
    """Those with a value, in batches: none holds up the database for long."""
    rows = field.model._base_manager.exclude(**{field.name: ""}).order_by("pk")
    columns = rows.values_list("pk", field.name, *field.bound_to)
    batch = list(columns[:BATCH])
    while batch:
        for pk, sealed, *place in batch:
            if sealed:
                yield _Row(pk, Sealed(sealed), place)
        batch = list(columns.filter(pk__gt=batch[-1][0])[:BATCH])


def _renew(field: EncryptedTextField, row: _Row) -> int:
    plain = secrets.unseal(row.sealed, field.purpose, *row.place)
    new = secrets.seal(plain, field.purpose, *row.place)
    same = field.model._base_manager.filter(**{"pk": row.pk, field.name: row.sealed})
    with transaction.atomic():
        return int(same.update(**{field.name: new}))
