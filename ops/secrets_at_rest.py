"""Count and re-encrypt all stored secrets, in the database and in the bot's store (lib/secrets.py)."""

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
class SecretCounts:
    """Numbers of secrets by the key that they are encrypted with."""

    total: int = 0
    outdated: int = 0  # not encrypted with the newest key; without the unreadable ones
    unreadable: int = 0
    rotated: int = 0


def count() -> SecretCounts:
    """Read every secret without changing it."""
    counts = SecretCounts()
    for field in secrets.fields():
        for row in _rows(field):
            _count(counts, row.sealed, field.purpose, row.place)
    for path in seeds.files(settings.BOT_RUNNER_STORE):
        _count(counts, seeds.stored(path), seeds.PURPOSE, [seeds.user_of(path)])
    return counts


def rotate() -> SecretCounts:
    """Encrypt outdated secrets with the newest key. A row that changes meanwhile is skipped: the change
    has encrypted it with the newest key. Unreadable secrets stay unchanged."""
    counts = SecretCounts()
    for field in secrets.fields():
        for row in _rows(field):
            if _count(counts, row.sealed, field.purpose, row.place):
                counts.rotated += _reencrypt(field, row)
    for path in seeds.files(settings.BOT_RUNNER_STORE):
        if _count(counts, seeds.stored(path), seeds.PURPOSE, [seeds.user_of(path)]):
            counts.rotated += seeds.renew(path)
    return counts


@dataclass(frozen=True)
class _Row:
    pk: Any
    sealed: Sealed
    place: list[Any]


def _count(counts: SecretCounts, sealed: Sealed, purpose: str, place: list[Any]) -> bool:
    """Count a secret. Return whether it must be encrypted again, and can be."""
    counts.total += 1
    try:
        secrets.unseal(sealed, purpose, *place)
    except Unreadable as error:
        counts.unreadable += 1
        logger.warning("%s (%s)", error, ", ".join(map(str, place)))
        return False
    if secrets.is_current(sealed):
        return False
    counts.outdated += 1
    return True


def _rows(field: EncryptedTextField) -> Iterator[_Row]:
    """Yield the rows with a value, in batches that block the database for a short time only."""
    rows = field.model._base_manager.exclude(**{field.name: ""}).order_by("pk")
    columns = rows.values_list("pk", field.name, *field.bound_to)
    batch = list(columns[:BATCH])
    while batch:
        for pk, sealed, *place in batch:
            if sealed:
                yield _Row(pk, Sealed(sealed), place)
        batch = list(columns.filter(pk__gt=batch[-1][0])[:BATCH])


def _reencrypt(field: EncryptedTextField, row: _Row) -> int:
    plain = secrets.unseal(row.sealed, field.purpose, *row.place)
    new = secrets.seal(plain, field.purpose, *row.place)
    same = field.model._base_manager.filter(**{"pk": row.pk, field.name: row.sealed})
    with transaction.atomic():
        return int(same.update(**{field.name: new}))
