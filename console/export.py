"""CSV export of all rows of a list: streamed in batches, safe to open in a spreadsheet."""

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
# Rows in memory at once. After the first batch, as many as make up BATCH_CHARACTERS of lines.
BATCH = 1000
FIRST = 20
BATCH_CHARACTERS = 4_000_000
# Characters that start a formula in a spreadsheet, full-width forms included.
FORMULA = tuple("=+-@\t\r\n＝＋－＠")  # noqa: RUF001


def _unguarded(request: HttpRequest, permissions: Iterable[str]) -> Callable[[], None]:
    raise NotImplementedError("The console's app sets this when it is ready.")


# Set to console.permissions.guard: this module does not depend on accounts.
guard: Callable[[HttpRequest, Iterable[str]], Callable[[], None]] = _unguarded


class _Echo:
    """A file that makes `writerow` return the line."""

    def write(self, line: str) -> str:
        return line


def response(
    request: HttpRequest, admin: "ModelAdmin[Any]", rows: QuerySet[Any], columns: Sequence[Any]
) -> StreamingHttpResponse:
    """Return the file with the columns of the list, and record the export."""
    name = admin.model._meta.model_name
    view = f"{admin.opts.app_label}.{get_permission_codename('view', admin.opts)}"
    filtered = request.GET.urlencode() or "all"
    audit.record(
        request, audit.Action.EXPORT, admin.model, result=f"{rows.count()} rows ({filtered})"
    )
    return StreamingHttpResponse(
        _lines(admin, rows, columns, guard(request, [PERMISSION, READS, view])),
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
    for number, batch in enumerate(in_batches(rows, size := BatchSize())):
        if number:
            check()
        for row in batch:
            line = writer.writerow([safe(_value(admin, row, name)) for name in columns])
            size.note(len(line))
            yield line


@dataclass
class BatchSize:
    """The number of rows of the next batch, by the length of the lines so far."""

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


def in_batches(rows: QuerySet[Any], size: BatchSize) -> Iterator[list[Model]]:
    """Yield batches by key: no cursor stays open during a slow download."""
    rows, last = rows.order_by("pk"), None
    while True:
        limit = size.next
        batch = list((rows if last is None else rows.filter(pk__gt=last))[:limit])
        yield batch
        if len(batch) < limit:
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
    # Spreadsheets skip blanks before a formula; the apostrophe makes the cell a text.
    return f"'{text}" if text.lstrip(" ").startswith(FORMULA) else text
