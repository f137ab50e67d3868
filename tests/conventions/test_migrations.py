"""Migrations after the first of an app: the previous release still runs beside the new tables."""

from collections.abc import Iterator
from typing import Any

import pytest
from django.db import migrations, models
from django.db.migrations.loader import MigrationLoader
from django.db.migrations.operations.base import Operation
from django.db.migrations.state import ProjectState

APPS = ("realm", "chat", "agents", "botrunner", "webhooks", "console")
# The previous release reads and writes what these would take away.
BREAKING = (
    migrations.RemoveField,
    migrations.RenameField,
    migrations.DeleteModel,
    migrations.RenameModel,
    migrations.AlterModelTable,
)


def objection(
    operation: Operation, before: ProjectState | None = None, app: str = ""
) -> str | None:
    """Return why the previous release could not run with an operation applied to the tables of
    `before`, those of the previous release."""
    if isinstance(operation, BREAKING):
        return "takes away what the previous release uses; do so one release after its last use"
    if isinstance(operation, migrations.AlterField):
        return _objection_to_field(operation, before, app)
    if isinstance(operation, migrations.AddConstraint):
        return _objection_to_constraint(operation, before, app)
    if isinstance(operation, migrations.AlterUniqueTogether):
        return "refuses rows of the previous release"
    if isinstance(operation, migrations.AddField) and not isinstance(
        operation.field, models.ManyToManyField
    ):
        field = operation.field
        if not field.null and not field.has_db_default():
            return "adds a column that the previous release leaves out: give it a db_default"
    return None


def _objection_to_field(
    operation: migrations.AlterField, before: ProjectState | None, app: str
) -> str | None:
    old = _fields(before, app, operation.model_name_lower).get(operation.name)
    new = operation.field
    if old is None:
        return None  # a column of this release
    if old.null and not new.null and not new.has_db_default():
        return "refuses the NULL that the previous release may write: give it a db_default"
    if new.unique and not old.unique:
        return "refuses the duplicates that the previous release may write"
    if old.get_internal_type() != new.get_internal_type():
        return "changes the type of a column that the previous release uses"
    if (new.max_length or 0) < (old.max_length or 0):
        return "refuses the long values that the previous release may write"
    return None


def _objection_to_constraint(
    operation: migrations.AddConstraint, before: ProjectState | None, app: str
) -> str | None:
    known = _fields(before, app, operation.model_name_lower)
    constraint = operation.constraint
    if not known:
        return None  # a table of this release
    if isinstance(constraint, models.UniqueConstraint):
        if _is_weaker(constraint, before, app, operation.model_name_lower):
            return None
        # A new column has its default in all rows of the previous release.
        new = [name for name in constraint.fields if name not in known]
        return None if new and constraint.condition else "refuses rows of the previous release"
    names = {name.partition("__")[0] for name in _names(constraint.condition)}
    return "refuses rows of the previous release" if names & known.keys() else None


def _is_weaker(
    constraint: models.UniqueConstraint, before: ProjectState | None, app: str, model: str
) -> bool:
    """Return whether the previous release has the constraint of that name, without a condition."""
    state = before.models.get((app, model)) if before else None
    constraints = state.options.get("constraints", []) if state else []
    return any(
        isinstance(each, models.UniqueConstraint)
        and (each.name, each.fields) == (constraint.name, constraint.fields)
        and each.condition is None
        for each in constraints
    )


def _names(condition: models.Q) -> Iterator[str]:
    for child in condition.children:
        if isinstance(child, models.Q):
            yield from _names(child)
        else:
            yield child[0]


def _fields(state: ProjectState | None, app: str, model: str) -> dict[str, Any]:
    """Return the fields of a model as the previous release knows it; empty if it does not."""
    found = state.models.get((app, model)) if state else None
    return dict(found.fields) if found else {}


def _previous(loader: MigrationLoader) -> ProjectState:
    """Return the tables as the first migrations create them."""
    first = [key for key in loader.disk_migrations if key[0] in APPS and key[1].startswith("0001")]
    return loader.project_state(first)


def test_the_previous_release_runs_with_every_later_migration() -> None:
    loader = MigrationLoader(None, ignore_no_migrations=True)
    before = _previous(loader)
    later = [
        (app, operation)
        for (app, name), migration in loader.disk_migrations.items()
        if app in APPS and not name.startswith("0001")
        for operation in migration.operations
    ]
    assert [
        f"{each.describe()}: {why}" for app, each in later if (why := objection(each, before, app))
    ] == []


@pytest.mark.parametrize(
    ("operation", "is_safe"),
    [
        (migrations.AddField("run", "note", models.TextField(null=True)), True),
        (migrations.AddField("run", "note", models.TextField(db_default="")), True),
        (migrations.AddField("run", "note", models.TextField(default="")), False),
        (migrations.RemoveField("run", "note"), False),
        (migrations.AddIndex("run", models.Index(fields=["note"], name="run_note")), True),
        (migrations.AlterField("run", "model", models.CharField(max_length=200)), True),
        (migrations.AlterField("run", "model", models.CharField(max_length=5)), False),
        (
            migrations.AlterField("run", "model", models.CharField(max_length=100, unique=True)),
            False,
        ),
        (migrations.AlterField("run", "model", models.IntegerField()), False),
        (migrations.AlterField("run", "answer", models.UUIDField()), False),
        (
            migrations.AddConstraint(
                "run", models.UniqueConstraint(fields=["model"], name="run_model_is_unique")
            ),
            False,
        ),
        (
            migrations.AddConstraint(
                "run", models.CheckConstraint(condition=~models.Q(model=""), name="run_has_model")
            ),
            False,
        ),
        (
            migrations.AddConstraint(
                "run", models.CheckConstraint(condition=~models.Q(note="x"), name="run_has_note")
            ),
            True,
        ),
        (migrations.AlterUniqueTogether("run", {("model", "status")}), False),
    ],
)
def test_what_is_safe(operation: Operation, is_safe: bool) -> None:
    before = _previous(MigrationLoader(None, ignore_no_migrations=True))
    assert (objection(operation, before, "agents") is None) is is_safe
