"""The seeds of the cross-signing keys: a file of the bot's store, encrypted (lib/secrets.py)."""

import json
from pathlib import Path

import orjson

from lib import secrets
from lib.secrets import Sealed

# The Matrix id of their account stands before it.
SUFFIX = ".cross_signing.json"
PURPOSE = "botrunner.cross_signing"


def files(store: Path) -> list[Path]:
    return sorted(store.glob(f"*{SUFFIX}"))


def user_of(path: Path) -> str:
    return path.name.removesuffix(SUFFIX)


def read(store: Path, user_id: str) -> dict[str, str] | None:
    """The seeds, by their usage; None where there is no file. Raises `lib.secrets.Unreadable`."""
    path = store / f"{user_id}{SUFFIX}"
    if not path.exists():
        return None
    renew(path)
    found: dict[str, str] = orjson.loads(secrets.unseal(path.read_text(), PURPOSE, user_id))
    return found


def write(store: Path, user_id: str, seeds: dict[str, str]) -> None:
    _write(store / f"{user_id}{SUFFIX}", json.dumps(seeds))


def stored(path: Path) -> Sealed:
    """The content of a file, as it is encrypted."""
    return Sealed(path.read_text())


def renew(path: Path) -> bool:
    """Encrypt a file under the newest key; False where it is. Raises `lib.secrets.Unreadable`."""
    text = stored(path)
    if secrets.is_current(text):
        return False
    _write(path, secrets.unseal(text, PURPOSE, user_of(path)))
    return True


def _write(path: Path, seeds: str) -> None:
    new = path.with_suffix(".new")
    new.touch(mode=0o600)
    new.write_text(secrets.seal(seeds, PURPOSE, user_of(path)))
    new.replace(path)
