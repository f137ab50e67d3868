"""Audit entries, permissions granted to roles, and bulk jobs."""

from django.conf import settings
from django.db import models
from django.db.models.functions import Now
from django.utils import timezone


class AuditEntry(models.Model):
    """An action or a reading in the admin. Written by console/audit.py and never changed."""

    class Action(models.TextChoices):
        ADD = "add"
        CHANGE = "change"
        DELETE = "delete"
        CANCEL = "cancel"
        RETRY = "retry"
        REQUEUE = "requeue"
        REPLAY = "replay"
        RESEND = "resend"
        ENABLE = "enable"
        DISABLE = "disable"
        ROTATE = "rotate"
        READ = "read"
        EXPORT = "export"
        BULK = "bulk"
        STOP = "stop"
        LOGIN = "login"
        LOCKOUT = "lockout"
        REFUSE = "refuse"

    at = models.DateTimeField(default=timezone.now, editable=False)
    who = models.ForeignKey(
        settings.AUTH_USER_MODEL, models.SET_NULL, null=True, related_name="+", db_index=False
    )
    # Outlives the account.
    name = models.CharField(max_length=255)
    action = models.CharField(max_length=10, choices=Action.choices)
    # No foreign key: entries outlive deleted and pruned objects.
    kind = models.CharField(max_length=100, blank=True, help_text="Such as agents.run.")
    object_id = models.CharField(max_length=255, blank=True)
    object_text = models.CharField(max_length=255, blank=True)
    reason = models.TextField(blank=True)
    result = models.TextField(blank=True)
    ip = models.GenericIPAddressField("IP address", null=True)

    class Meta:
        verbose_name_plural = "audit entries"
        permissions = [
            ("export_rows", "Can export lists as CSV"),
            ("see_system", "Can see the system page"),
        ]
        indexes = [
            # The list, newest first: complete, by user, by action.
            models.Index(fields=["-at", "id"], name="audit_newest"),
            models.Index(fields=["who", "-at"], name="audit_by_who"),
            models.Index(fields=["action", "-at"], name="audit_by_action"),
            # The entries of one object; also the last reading of it.
            models.Index(fields=["kind", "object_id", "-at"], name="audit_by_object"),
        ]

    def __str__(self) -> str:
        return f"{self.name}: {self.action} {self.object_text}".rstrip()


class RoleGrant(models.Model):
    """A permission that `migrate` has granted to a group. Each is granted only once, so a permission
    that an admin removes stays removed."""

    group = models.CharField(max_length=150)
    permission = models.CharField(max_length=201, help_text="Such as agents.cancel_run.")

    class Meta:
        constraints = [
            models.UniqueConstraint(fields=["group", "permission"], name="role_grant_is_unique"),
        ]

    def __str__(self) -> str:
        return f"{self.group}: {self.permission}"


class BulkJobQuerySet(models.QuerySet["BulkJob"]):
    def unfinished(self) -> "BulkJobQuerySet":
        return self.filter(finished_at=None)

    def abandoned(self) -> "BulkJobQuerySet":
        """Return the jobs without a worker, by the database's clock: never claimed, or their lease has
        expired."""
        return self.unfinished().filter(
            models.Q(lease_expires_at=None) | models.Q(lease_expires_at__lt=Now())
        )


class BulkJob(models.Model):
    """An action that a worker applies to many rows, one at a time; see console/bulk.py."""

    class Status(models.TextChoices):
        WAITING = "waiting"
        RUNNING = "running"
        DONE = "done"
        STOPPED = "stopped"

    action = models.CharField(max_length=100, help_text="Such as agents.cancel_run.")
    title = models.CharField(max_length=200)
    kind = models.CharField(max_length=100)
    filter = models.TextField(blank=True, help_text="How the list was filtered.")
    reason = models.TextField(blank=True)
    who = models.ForeignKey(
        settings.AUTH_USER_MODEL, models.SET_NULL, null=True, related_name="+", db_index=False
    )
    name = models.CharField("by", max_length=255)
    ip = models.GenericIPAddressField("IP address", null=True)
    status = models.CharField(max_length=7, choices=Status.choices, default=Status.WAITING)
    total = models.PositiveIntegerField(default=0)
    done = models.PositiveIntegerField(default=0)
    skipped = models.PositiveIntegerField(default=0, help_text="There was nothing to do any more.")
    failed = models.PositiveIntegerField(default=0)
    stop_requested = models.BooleanField(default=False)
    lease_expires_at = models.DateTimeField(null=True, blank=True)
    created_at = models.DateTimeField(default=timezone.now, editable=False)
    started_at = models.DateTimeField(null=True, blank=True)
    finished_at = models.DateTimeField(null=True, blank=True)

    objects = BulkJobQuerySet.as_manager()

    class Meta:
        indexes = [
            # The list, newest first.
            models.Index(fields=["-created_at", "id"], name="bulk_job_newest"),
            # abandoned(): console.bulk.dispatch_abandoned().
            models.Index(
                fields=["lease_expires_at"],
                name="bulk_job_unfinished",
                condition=models.Q(finished_at=None),
            ),
        ]
        constraints = [
            models.CheckConstraint(
                condition=models.Q(status__in=["done", "stopped"], finished_at__isnull=False)
                | models.Q(status__in=["waiting", "running"], finished_at__isnull=True),
                name="bulk_job_ends_when_finished",
            ),
        ]

    def __str__(self) -> str:
        return f"{self.title}: {self.total}"

    @property
    def is_finished(self) -> bool:
        return self.finished_at is not None

    @property
    def tried(self) -> int:
        return self.done + self.skipped + self.failed

    @property
    def percent(self) -> int:
        return self.tried * 100 // self.total if self.total else 100


class BulkItem(models.Model):
    """A row of a bulk job, chosen when the job starts."""

    class Outcome(models.TextChoices):
        DONE = "done"
        SKIPPED = "skipped"
        FAILED = "failed"

    job = models.ForeignKey(BulkJob, models.CASCADE, related_name="items", db_index=False)
    object_id = models.CharField(max_length=255)
    outcome = models.CharField(max_length=7, choices=Outcome.choices, blank=True)
    error = models.TextField(blank=True)

    class Meta:
        indexes = [
            # The remaining items, and the results of the others.
            models.Index(fields=["job", "outcome", "id"], name="bulk_item_by_outcome"),
        ]

    def __str__(self) -> str:
        return self.object_id
