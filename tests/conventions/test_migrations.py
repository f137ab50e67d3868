"""Migrations after the first of an app: the previous release still runs beside the new tables."""

import pytest
from django.db import migrations, models
from django.db.migrations.loader import MigrationLoader
from django.db.migrations.operations.base import Operation

APPS = ("realm", "chat", "agents", "botrunner", "webhooks", "console")
# The previous release reads and writes what these would take away.
BREAKING = (
    migrations.RemoveField,
    migrations.RenameField,
    migrations.DeleteModel,
    migrations.RenameModel,
    migrations.AlterModelTable,
)


def objection(operation: Operation) -> str | None:
    """Return why the previous release could not run with an operation applied."""
    if isinstance(operation, BREAKING):
        return "takes away what the previous release uses; do so one release after its last use"
    if isinstance(operation, migrations.AddField) and not isinstance(
        operation.field, models.ManyToManyField
    ):
        field = operation.field
        if not field.null and not field.has_db_default():
            return "adds a column that the previous release leaves out: give it a db_default"
    return None


def objections(applied: list[Operation]) -> list[str]:
    return [f"{each.describe()}: {why}" for each in applied if (why := objection(each))]


def test_the_previous_release_runs_with_every_later_migration() -> None:
    loader = MigrationLoader(None, ignore_no_migrations=True)
    later = [
        operation
        for (app, name), migration in loader.disk_migrations.items()
        if app in APPS and not name.startswith("0001")
        for operation in migration.operations
    ]
    assert objections(later) == []


@pytest.mark.parametrize(
    ("operation", "is_safe"),
    [
        (migrations.AddField("run", "note", models.TextField(null=True)), True),
        (migrations.AddField("run", "note", models.TextField(db_default="")), True),
        (migrations.AddField("run", "note", models.TextField(default="")), False),
        (migrations.RemoveField("run", "note"), False),
        (migrations.AddIndex("run", models.Index(fields=["note"], name="run_note")), True),
    ],
)
def test_what_is_safe(operation: Operation, is_safe: bool) -> None:
    assert (objection(operation) is None) is is_safe
