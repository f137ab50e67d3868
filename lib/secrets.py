"""Secrets at rest: tokens, keys and seeds are encrypted in the database and in files.

Each value is encrypted by AES-256-GCM under the first key of `SECRETS_KEY` and can be decrypted by any
of them, so that keys can be changed (`manage.py rotate_secrets`). Each purpose has a key of its own,
derived by HKDF-SHA256. A value is bound to its place, such as one field of one row: moved to another
place, it cannot be decrypted there.
"""

import base64
import binascii
import json
import os
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from django.apps import apps
from django.conf import settings
from django.db import models
from django.db.models.query_utils import DeferredAttribute

# What every encrypted value begins with; the id of its key and the data follow.
PREFIX = "enc:1:"
NONCE_BYTES = 12
# Of an encrypted column: whether it is empty, and whether it is still as it was read.
LOOKUPS = {"exact", "in", "isnull"}


class Unreadable(Exception):
    """A stored secret cannot be decrypted; the message names the variable and is safe to show."""


class Sealed(str):
    """A value as it is stored: encrypted, or from before there was encryption."""

    __slots__ = ()

    @property
    def key_id(self) -> str:
        """The id of the key that it was encrypted under; empty if it is not encrypted."""
        return self[len(PREFIX) :].partition(":")[0] if self.startswith(PREFIX) else ""


class Opened(str):
    """A decrypted value, with what it was decrypted from and where that stands."""

    sealed: Sealed
    home: tuple[object, ...]

    @classmethod
    def of(cls, sealed: Sealed, purpose: str, place: list[object]) -> "Opened":
        made = cls(unseal(sealed, purpose, *place))
        made.sealed, made.home = sealed, (purpose, *place)
        return made


def seal(plain: str, purpose: str, *place: object) -> Sealed:
    """Encrypt a text for one place of a purpose."""
    key = settings.SECRETS_KEY[0]
    nonce = os.urandom(NONCE_BYTES)
    data = _cipher(key, purpose).encrypt(nonce, plain.encode(), _bound_to(purpose, place))
    text = base64.urlsafe_b64encode(nonce + data).decode()
    return Sealed(f"{PREFIX}{key_id(key)}:{text}")


def unseal(sealed: str, purpose: str, *place: object) -> str:
    """The text that was encrypted for that place. One that is not encrypted is returned as it is:
    `manage.py rotate_secrets` encrypts it. Raises `Unreadable`."""
    if not sealed.startswith(PREFIX):
        return sealed
    wanted, _, text = sealed[len(PREFIX) :].partition(":")
    for key in settings.SECRETS_KEY:
        if key_id(key) == wanted:
            return _opened(key, text, purpose, place)
    raise Unreadable(
        f"A stored secret ({purpose}) was encrypted under a key that SECRETS_KEY does not have. Set "
        "SECRETS_KEY to the key that it was encrypted under, beside the present one."
    )


def _opened(key: str, text: str, purpose: str, place: tuple[object, ...]) -> str:
    try:
        raw = base64.urlsafe_b64decode(text)
        nonce, data = raw[:NONCE_BYTES], raw[NONCE_BYTES:]
        return _cipher(key, purpose).decrypt(nonce, data, _bound_to(purpose, place)).decode()
    except (InvalidTag, binascii.Error, ValueError):
        raise Unreadable(
            f"A stored secret ({purpose}) cannot be decrypted by SECRETS_KEY: it was changed, or comes "
            "from another row or another database. Restore it from a backup, or make a new one."
        ) from None


def is_current(sealed: str) -> bool:
    """Whether it is encrypted under the newest key."""
    return Sealed(sealed).key_id == key_id(settings.SECRETS_KEY[0])


def key_id(key: str) -> str:
    """A name for a key that reveals nothing of it."""
    return _derived(key, "id")[:6].hex()


def _cipher(key: str, purpose: str) -> AESGCM:
    return AESGCM(_derived(key, f"for {purpose}"))


@lru_cache(maxsize=128)
def _derived(key: str, info: str) -> bytes:
    derivation = HKDF(SHA256(), length=32, salt=None, info=f"botrealm secrets 1 {info}".encode())
    return derivation.derive(key.encode())


def _bound_to(purpose: str, place: tuple[object, ...]) -> bytes:
    return json.dumps([purpose, *map(str, place)]).encode()


class _Attribute(DeferredAttribute):
    """Decrypts when it is read, so that a row can be loaded and saved without its key."""

    field: "EncryptedTextField"

    def __get__(self, instance: Any, cls: Any = None) -> Any:
        value = super().__get__(instance, cls)
        if isinstance(value, Sealed):
            value = Opened.of(value, self.field.purpose, self.field.place(instance))
            instance.__dict__[self.field.attname] = value
        return value

    def __set__(self, instance: Any, value: Any) -> None:
        # With this, what stands in the instance does not go before `__get__`.
        instance.__dict__[self.field.attname] = value


class EncryptedTextField(models.TextField):
    """A text that is encrypted in the database; an empty one stays empty.

    It is bound to the row by the fields that `bound_to` names, which must never change. Rows cannot be
    looked up by it, and `update()` cannot set it: save the row.
    """

    descriptor_class = _Attribute

    def __init__(self, *args: Any, bound_to: tuple[str, ...] = ("pk",), **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.bound_to = tuple(bound_to)

    def deconstruct(self) -> Any:
        name, path, args, kwargs = super().deconstruct()
        return name, path, args, {**kwargs, "bound_to": self.bound_to}

    @property
    def purpose(self) -> str:
        return f"{self.model._meta.label_lower}.{self.name}"

    def place(self, instance: models.Model) -> list[object]:
        return [getattr(instance, name) for name in self.bound_to]

    def sealed_of(self, instance: models.Model) -> Sealed | str:
        """The value as it is to be stored. One that was not read is stored as it was."""
        value = instance.__dict__.get(self.attname)
        if value is None:
            value = getattr(instance, self.attname)  # it was deferred
        if isinstance(value, Sealed) or not value:
            return value or ""
        place = self.place(instance)
        if isinstance(value, Opened) and value.home == (self.purpose, *place):
            return value.sealed
        if None in place:
            raise ValueError(
                f"{self.purpose} cannot be encrypted before {self.bound_to} are known."
            )
        return seal(value, self.purpose, *place)

    def from_db_value(self, value: str | None, expression: Any, connection: Any) -> Any:
        return Sealed(value) if value else value

    def to_python(self, value: Any) -> Any:
        """Of a fixture, which has the value as it is stored."""
        if isinstance(value, str) and value.startswith(PREFIX):
            return Sealed(value)
        return super().to_python(value)

    def pre_save(self, model_instance: models.Model, add: bool) -> Any:
        return self.sealed_of(model_instance)

    def get_lookup(self, lookup_name: str) -> Any:
        """None by a part of it, for which Django would not ask `get_prep_value`."""
        return super().get_lookup(lookup_name) if lookup_name in LOOKUPS else None

    def get_prep_value(self, value: Any) -> Any:
        if isinstance(value, Opened):
            value = value.sealed  # loaddata saves what it reads from the row
        if value and not isinstance(value, Sealed):
            raise TypeError(
                f"{self.name} is encrypted: rows cannot be looked up by it, and are changed by save()."
            )
        return None if value is None else str(value)

    def value_to_string(self, obj: models.Model) -> str:
        """For exports such as dumpdata, which have it encrypted."""
        return self.sealed_of(obj)


def fields() -> Iterator[EncryptedTextField]:
    """Every encrypted field of every model."""
    for model in apps.get_models():
        for field in model._meta.local_fields:
            if isinstance(field, EncryptedTextField):
                yield field
