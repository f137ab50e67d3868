"""Secrets at rest: tokens, keys and seeds are encrypted in the database and in files.

Each value is encrypted by AES-256-GCM under the first key of `SECRETS_KEY` and can be decrypted by any
of them, so that keys can be changed (`manage.py rotate_secrets`). Each purpose has a key of its own,
derived by HKDF-SHA256. A value is bound to its place, such as one field of one row: it cannot be
decrypted in another place.
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

# The prefix of every encrypted value; the id of its key and the data follow.
PREFIX = "enc:1:"
NONCE_BYTES = 12
# The lookups of an encrypted column: for emptiness, and for an unchanged value.
LOOKUPS = {"exact", "in", "isnull"}


class Unreadable(Exception):
    """A stored secret cannot be decrypted; the message names the variable and is safe to show."""


class Sealed(str):
    """A stored value: encrypted, or older than encryption."""

    __slots__ = ()

    @property
    def key_id(self) -> str:
        """Return the id of the key; empty if the value is not encrypted."""
        return self[len(PREFIX) :].partition(":")[0] if self.startswith(PREFIX) else ""


class Opened(str):
    """A decrypted value, with its encrypted form and its place."""

    sealed: Sealed
    home: tuple[object, ...]

    @classmethod
    def of(cls, sealed: Sealed, purpose: str, place: list[object]) -> "Opened":
        opened = cls(unseal(sealed, purpose, *place))
        opened.sealed, opened.home = sealed, (purpose, *place)
        return opened


def seal(plain: str, purpose: str, *place: object) -> Sealed:
    """Encrypt a text for one place of a purpose."""
    key = settings.SECRETS_KEY[0]
    nonce = os.urandom(NONCE_BYTES)
    data = _cipher(key, purpose).encrypt(nonce, plain.encode(), _bound_to(purpose, place))
    text = base64.urlsafe_b64encode(nonce + data).decode()
    return Sealed(f"{PREFIX}{key_id(key)}:{text}")


def unseal(sealed: str, purpose: str, *place: object) -> str:
    """Decrypt a text for its place. Return one that is not encrypted unchanged: `manage.py
    rotate_secrets` encrypts it. Raises `Unreadable`."""
    if not sealed.startswith(PREFIX):
        return sealed
    wanted_id, _, text = sealed[len(PREFIX) :].partition(":")
    for key in settings.SECRETS_KEY:
        if key_id(key) == wanted_id:
            return _opened(key, text, purpose, place)
    raise Unreadable(
        f"A stored secret ({purpose}) was encrypted with a key that SECRETS_KEY does not have. Add "
        "that key to SECRETS_KEY, after the current one."
    )


def _opened(key: str, text: str, purpose: str, place: tuple[object, ...]) -> str:
    try:
        raw = base64.urlsafe_b64decode(text)
        nonce, data = raw[:NONCE_BYTES], raw[NONCE_BYTES:]
        return _cipher(key, purpose).decrypt(nonce, data, _bound_to(purpose, place)).decode()
    except (InvalidTag, binascii.Error, ValueError):
        raise Unreadable(
            f"A stored secret ({purpose}) cannot be decrypted with SECRETS_KEY: it was changed, or "
            "comes from another row or database. Restore it from a backup, or create a new one."
        ) from None


def is_current(sealed: str) -> bool:
    """Return True if the value is encrypted with the newest key."""
    return Sealed(sealed).key_id == key_id(settings.SECRETS_KEY[0])


def key_id(key: str) -> str:
    """Return a name for a key that reveals nothing of the key."""
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
    """Decrypts on access, so that a row can be loaded and saved without its key."""

    field: "EncryptedTextField"

    def __get__(self, instance: Any, cls: Any = None) -> Any:
        value = super().__get__(instance, cls)
        if isinstance(value, Sealed):
            value = Opened.of(value, self.field.purpose, self.field.place(instance))
            instance.__dict__[self.field.attname] = value
        return value

    def __set__(self, instance: Any, value: Any) -> None:
        # A data descriptor, so that the instance's dict does not shadow `__get__`.
        instance.__dict__[self.field.attname] = value


class EncryptedTextField(models.TextField):
    """A text that is encrypted in the database; an empty one stays empty.

    It is bound to the row by the fields that `bound_to` names, which must never change. Rows cannot be
    filtered by it, and `update()` cannot set it: save the row.
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
        """Return the value to store. One that was not read keeps its stored form."""
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
        """Accept the stored form, which fixtures have."""
        if isinstance(value, str) and value.startswith(PREFIX):
            return Sealed(value)
        return super().to_python(value)

    def pre_save(self, model_instance: models.Model, add: bool) -> Any:
        return self.sealed_of(model_instance)

    def get_lookup(self, lookup_name: str) -> Any:
        """Refuse lookups by parts, for which Django does not call `get_prep_value`."""
        return super().get_lookup(lookup_name) if lookup_name in LOOKUPS else None

    def get_prep_value(self, value: Any) -> Any:
        if isinstance(value, Opened):
            value = value.sealed  # loaddata saves what it reads from the row
        if value and not isinstance(value, Sealed):
            raise TypeError(
                f"{self.name} is encrypted: rows cannot be filtered by it, and only save() changes it."
            )
        return None if value is None else str(value)

    def value_to_string(self, obj: models.Model) -> str:
        """Return the encrypted form for exports such as dumpdata."""
        return self.sealed_of(obj)


def fields() -> Iterator[EncryptedTextField]:
    """Yield every encrypted field of every model."""
    for model in apps.get_models():
        for field in model._meta.local_fields:
            if isinstance(field, EncryptedTextField):
                yield field
