from django.apps import AppConfig


class HooksConfig(AppConfig):
    name = "hooks"
    verbose_name = "Webhooks"

    def ready(self) -> None:
        from agents import audience
        from agents.chores import CHORES
        from hooks import deliveries, sender

        audience.wanted = deliveries.wanted
        CHORES.append((sender.Sender().tick, sender.SECONDS))
