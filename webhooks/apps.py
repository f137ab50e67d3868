from django.apps import AppConfig


class WebhooksConfig(AppConfig):
    name = "webhooks"
    verbose_name = "Webhooks"

    def ready(self) -> None:
        from agents.events import hooks
        from agents.worker.maintenance import PERIODIC_JOBS
        from webhooks import deliveries, sender

        hooks.needs_delivery = deliveries.needs_delivery
        PERIODIC_JOBS.append((sender.WebhookSender().tick, sender.SECONDS))
