from django.apps import AppConfig


class BotRunnerConfig(AppConfig):
    name = "botrunner"
    verbose_name = "Bot runner"
