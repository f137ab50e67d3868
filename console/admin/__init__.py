"""Every ModelAdmin of the project. Django's autodiscover imports this package."""

from console.admin import audit, people, rooms, runs, threads, usage, webhooks

__all__ = ["audit", "people", "rooms", "runs", "threads", "usage", "webhooks"]
