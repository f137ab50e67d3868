"""Seeds of the cross-signing keys: an encrypted file (lib/secrets.py) in the bot's store."""

import json
from pathlib import Path

import orjson

from lib import secrets
from lib.secrets import Sealed

# After the Matrix id of the account.
SUFFIX = ".cross_signing.json"
PURPOSE = "botrunner.cross_signing"


def files(store: Path) -> list[Path]:
    return sorted(store.glob(f"*{SUFFIX}"))


def user_of(path: Path) -> str:
    return path.name.removesuffix(SUFFIX)


def read(store: Path, user_id: str) -> dict[str, str] | None:
    """Read the seeds by usage; return None if there is no file. Raises `lib.secrets.Unreadable`."""
    path = store / f"{user_id}{SUFFIX}"
    if not path.exists():
        return None
    renew(path)
    seeds: dict[str, str] = orjson.loads(secrets.unseal(path.read_text(), PURPOSE, user_id))
    return seeds


def write(store: Path, user_id: str, seeds: dict[str, str]) -> None:
    _write(store / f"{user_id}{SUFFIX}", json.dumps(seeds))


def stored(path: Path) -> Sealed:
    """Return the encrypted content of a file."""
    return Sealed(path.read_text())


def renew(path: Path) -> bool:
    """Encrypt a file with the newest key; return False if it is. Raises `lib.secrets.Unreadable`."""
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
