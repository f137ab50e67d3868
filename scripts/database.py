"""Bring the database up to date, and make sure that somebody can sign in to the admin.

One process for both, because importing Django is what takes the time. Run it as a module, from the
repository's root: `python -m scripts.database`.
"""

import contextlib
import io
import os
import secrets
import sys
from pathlib import Path

import django
from django.contrib.auth import get_user_model
from django.core.exceptions import ImproperlyConfigured
from django.core.management import CommandError, call_command
from django.db import DatabaseError, connection


def keep_private(database: Path) -> None:
    """Take from others what an earlier version let them read. Who opens the database next makes its
    -wal and -shm with the same rights."""
    for path in (database, Path(f"{database}-wal"), Path(f"{database}-shm")):
        with contextlib.suppress(FileNotFoundError, PermissionError):
            path.chmod(0o600)


def migrate() -> None:
    """Raises `SystemCheckError` where the settings are refused."""
    # Warnings go nowhere: the web server and scripts/ready.py say what matters of them.
    call_command("migrate", interactive=False, verbosity=0, skip_checks=False, stderr=io.StringIO())


def make_admin(password_file: Path) -> None:
    """Create the superuser `admin` if there is no superuser at all.

    The password is written down first: dying in between costs another password, not the way in.
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


def main() -> None:
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "config.settings")
    try:
        django.setup()
        if connection.vendor == "sqlite":
            keep_private(Path(connection.settings_dict["NAME"]))
        migrate()
        make_admin(Path(os.environ["STACK_DIR"]) / "admin-password")
    except (ImproperlyConfigured, CommandError, DatabaseError) as error:
        sys.exit(f"{error}".strip())


if __name__ == "__main__":
    main()
