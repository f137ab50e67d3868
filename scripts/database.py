"""Migrate the database, create the first admin, and write down the settings that the stack prints.

One process for all three, because importing Django takes most of the time. Run it as a module, from
the repository's root: `python -m scripts.database`.
"""

import contextlib
import io
import json
import os
import secrets
import sys
from pathlib import Path

import django
from django.conf import settings
from django.contrib.auth import get_user_model
from django.core.exceptions import ImproperlyConfigured
from django.core.management import CommandError, call_command
from django.db import DatabaseError, connection

from lib import db


def keep_private(database: Path) -> None:
    """Remove the rights of other users, which an earlier version granted. The next connection creates
    -wal and -shm with the same rights."""
    for path in (database, Path(f"{database}-wal"), Path(f"{database}-shm")):
        with contextlib.suppress(FileNotFoundError, PermissionError):
            # DATABASE_URL may name a folder by mistake, which others need.
            if path.is_file():
                path.chmod(0o600)


def migrate() -> None:
    """Apply the migrations. Raises `SystemCheckError` where the settings are refused."""
    # Warnings are dropped: the web server and scripts/ready.py print those that matter.
    call_command("migrate", interactive=False, verbosity=0, skip_checks=False, stderr=io.StringIO())


def make_admin(password_file: Path) -> None:
    """Create the superuser `admin` if there is no superuser.

    The password is written first: a crash in between costs a new password, not the access.
    """
    if get_user_model()._default_manager.filter(is_superuser=True).exists():
        return
    password = secrets.token_urlsafe(12)
    password_file.unlink(missing_ok=True)
    password_file.touch(mode=0o600)
    password_file.write_text(f"{password}\n")
    os.environ["DJANGO_SUPERUSER_PASSWORD"] = password
    call_command(
        "createsuperuser",
        interactive=False,
        verbosity=0,
        username="admin",
        email="admin@localhost",
    )


def write_settings(path: Path) -> None:
    """Write the settings for scripts/ready.py and scripts/rooms.py, which import no Django."""
    known = {
        "stream": settings.REDIS_STREAM_KEY,
        "bot_group": settings.BOT_RUNNER_CONSUMER_GROUP,
        "model": settings.CHAT_DEFAULT_MODEL,
        "model_configured": bool(settings.OPENAI_API_KEY or settings.OPENAI_BASE_URL),
    }
    path.write_text(json.dumps(known))


def main() -> None:
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "config.settings")
    try:
        django.setup()
        # A pool retries for a while; here an error is reported at once.
        connection.settings_dict["OPTIONS"].pop("pool", None)
        if connection.vendor == "sqlite":
            keep_private(Path(connection.settings_dict["NAME"]))
        migrate()
        make_admin(Path(os.environ["STACK_DIR"]) / "admin-password")
        write_settings(Path(os.environ["STACK_DIR"]) / "settings.json")
    except (ImproperlyConfigured, CommandError) as error:
        sys.exit(f"{error}".strip())
    except DatabaseError as error:
        sys.exit(db.why(error) or f"DATABASE_URL: {db.one_line(error)}")


if __name__ == "__main__":
    main()
