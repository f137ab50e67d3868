from django.apps import AppConfig


class BotRunnerConfig(AppConfig):
    name = "botrunner"
    verbose_name = "Bot runner"

    def ready(self) -> None:
        from botrunner import models
        from chat import membership

        membership.member_condition = models.is_member
