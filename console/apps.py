from django.apps import AppConfig
from django.contrib.auth.signals import user_logged_in
from django.db.models.signals import post_migrate


class ConsoleConfig(AppConfig):
    name = "console"
    verbose_name = "Console"

    def ready(self) -> None:
        from axes.signals import user_locked_out

        import realm.audit
        from agents.worker.maintenance import PERIODIC_JOBS
        from console import audit, bulk, export, login, permissions, roles

        export.guard = permissions.guard
        realm.audit.record = audit.record_change
        PERIODIC_JOBS.append((bulk.dispatch_abandoned, bulk.SWEEP_SECONDS))
        post_migrate.connect(roles.grant, dispatch_uid="console.roles")
        user_logged_in.connect(login.note_login, dispatch_uid="console.login")
        user_locked_out.connect(login.note_lockout, dispatch_uid="console.lockout")
