"""All rows that a list has found, as CSV: streamed, in batches, safe to open with a spreadsheet."""

import csv
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from django.contrib.admin import ModelAdmin
from django.contrib.admin.utils import label_for_field, lookup_field
from django.contrib.auth import get_permission_codename
from django.db.models import Model, QuerySet
from django.http import HttpRequest, StreamingHttpResponse
from django.utils import timezone
from django.utils.html import strip_tags
from django.utils.safestring import SafeString

from console import audit

PERMISSION = "console.export_rows"
READS = "chat.read_messages"
# Rows that are in memory at once: as many as make lines of so much, going by those before them.
BATCH = 1000
FIRST = 20
BATCH_CHARACTERS = 4_000_000
# What a spreadsheet takes for the beginning of a formula, the wide forms included.
FORMULA = tuple("=+-@\t\r\n＝＋－＠")  # noqa: RUF001


def _unguarded(request: HttpRequest, permissions: Iterable[str]) -> Callable[[], None]:
    raise NotImplementedError("The console's app sets this when it is ready.")


# What looks up again whether an export may go on (console.rights): this module knows no accounts.
guard: Callable[[HttpRequest, Iterable[str]], Callable[[], None]] = _unguarded


class _Echo:
    """A file whose lines are what `writerow` returns."""

    def write(self, line: str) -> str:
        return line


def response(
    request: HttpRequest, admin: "ModelAdmin[Any]", rows: QuerySet[Any], columns: Sequence[Any]
) -> StreamingHttpResponse:
    """The file, with what the list's columns show. The export is on record."""
    name = admin.model._meta.model_name
    views = f"{admin.opts.app_label}.{get_permission_codename('view', admin.opts)}"
    filtered = request.GET.urlencode() or "all"
    audit.note(
        request, audit.Action.EXPORT, admin.model, result=f"{rows.count()} rows ({filtered})"
    )
    return StreamingHttpResponse(
        _lines(admin, rows, columns, guard(request, [PERMISSION, READS, views])),
        content_type="text/csv; charset=utf-8",
        headers={
            "Content-Disposition": f'attachment; filename="{name}-{timezone.now():%Y%m%d-%H%M%S}.csv"'
        },
    )


def _lines(
    admin: "ModelAdmin[Any]", rows: QuerySet[Any], columns: Sequence[Any], check: Callable[[], None]
) -> Iterator[str]:
    writer = csv.writer(_Echo())
    yield writer.writerow([label_for_field(name, admin.model, admin) for name in columns])
    for number, batch in enumerate(in_batches(rows, size := Size())):
        if number:
            check()
        for row in batch:
            line = writer.writerow([safe(_value(admin, row, name)) for name in columns])
            size.note(len(line))
            yield line


@dataclass
class Size:
    """How many rows to read next."""

    rows: int = 0
    characters: int = 0

    def note(self, characters: int) -> None:
        self.rows += 1
        self.characters += characters

    @property
    def next(self) -> int:
        if not self.rows:
            return min(FIRST, BATCH)
        return min(max(1, BATCH_CHARACTERS * self.rows // max(self.characters, 1)), BATCH)


def in_batches(rows: QuerySet[Any], size: Size) -> Iterator[list[Model]]:
    """By key: no cursor is held open for as long as somebody's download takes."""
    rows, last = rows.order_by("pk"), None
    while True:
        most = size.next
        batch = list((rows if last is None else rows.filter(pk__gt=last))[:most])
        yield batch
        if len(batch) < most:
            return
        last = batch[-1].pk


def _value(admin: "ModelAdmin[Any]", row: Model, name: Any) -> Any:
    return lookup_field(name, row, admin)[2]


def safe(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, datetime):
        return value.isoformat(timespec="milliseconds")
    text = strip_tags(value) if isinstance(value, SafeString) else str(value)
    # Spreadsheets skip blanks before a formula; the apostrophe makes it a text.
    return f"'{text}" if text.lstrip(" ").startswith(FORMULA) else text
