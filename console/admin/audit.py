from typing import Any

from django.contrib import admin, messages
from django.contrib.admin.utils import quote
from django.core.exceptions import PermissionDenied
from django.http import Http404, HttpRequest, HttpResponse
from django.shortcuts import redirect, render
from django.template.response import TemplateResponse
from django.urls import NoReverseMatch, path, reverse
from django.utils.html import format_html
from django.views.decorators.http import require_POST
from django_otp.plugins.otp_totp.models import TOTPDevice

from console import bulk
from console.base import EmptyState, ReadOnlyAdmin
from console.models import AuditEntry, BulkItem, BulkJob

# Its pages show the keys: a user who may change a device could sign in as its owner.
admin.site.unregister(TOTPDevice)


@admin.register(AuditEntry)
class AuditEntryAdmin(ReadOnlyAdmin):
    empty = EmptyState("Actions in the admin and readings of other users' messages appear here.")
    list_display = ["at", "name", "action", "object_link", "reason", "result", "ip"]
    list_filter = ["action"]
    search_fields = ["=name", "=object_id"]
    ordering = ["-at", "id"]
    fields = ["at", "name", "action", "object_link", "reason", "result", "ip"]

    @admin.display(description="object")
    def object_link(self, entry: AuditEntry) -> str:
        text = entry.object_text or entry.object_id
        try:
            page = f"admin:{entry.kind.replace('.', '_')}"
            url = (
                reverse(f"{page}_change", args=[quote(entry.object_id)])
                if entry.object_id
                else reverse(f"{page}_changelist")
            )
        except NoReverseMatch:
            return text
        return format_html('<a href="{}">{}</a>', url, text)

    def has_view_permission(self, request: HttpRequest, obj: AuditEntry | None = None) -> bool:
        # No other permission implies it.
        return request.user.has_perm("console.view_auditentry")


@admin.register(BulkJob)
class BulkJobAdmin(ReadOnlyAdmin):
    empty = EmptyState("Select rows of a list, such as failed runs, and an action for all of them.")
    list_display = [
        "__str__",
        "status",
        "progress",
        "done",
        "skipped",
        "failed",
        "name",
        "created_at",
    ]
    list_filter = ["status"]
    search_fields = ["=name"]
    ordering = ["-created_at", "id"]
    actions = None

    @admin.display
    def progress(self, job: BulkJob) -> str:
        return f"{job.percent} %"

    def get_urls(self) -> list[Any]:
        def url(name: str, view: Any) -> Any:
            return path(
                f"<int:pk>/{name}/",
                self.admin_site.admin_view(view),
                name=f"console_bulkjob_{name}",
            )

        return [
            url("progress", self.progress_view),
            url("stop", require_POST(self.stop_view)),
            *super().get_urls(),
        ]

    def change_view(self, request: HttpRequest, object_id: str, *args: Any) -> HttpResponse:
        job = self._job(request, object_id)
        context = {
            **self.admin_site.each_context(request),
            "title": str(job),
            "opts": self.opts,
            "original": job,
            **self._progress_context(request, job),
        }
        return TemplateResponse(request, "console/bulk_job.html", context)

    def progress_view(self, request: HttpRequest, pk: int) -> HttpResponse:
        job = self._job(request, pk)
        return render(request, "console/bulk_progress.html", self._progress_context(request, job))

    def stop_view(self, request: HttpRequest, pk: int) -> HttpResponse:
        job = self._job(request, pk)
        if not request.user.has_perm(job.action):
            raise PermissionDenied
        if not bulk.stop(request, job):
            self.message_user(request, "The job had already finished.", messages.WARNING)
        return redirect("admin:console_bulkjob_change", pk)

    def _job(self, request: HttpRequest, pk: Any) -> BulkJob:
        if not self.has_view_permission(request):
            raise PermissionDenied
        job: BulkJob | None = self.get_object(request, str(pk))
        if job is None:
            raise Http404
        return job

    def _progress_context(self, request: HttpRequest, job: BulkJob) -> dict[str, Any]:
        return {
            "job": job,
            "may_stop": request.user.has_perm(job.action),
            "failures": job.items.filter(outcome=BulkItem.Outcome.FAILED).order_by("id")[:50],
        }
