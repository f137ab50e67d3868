"""Celery tasks: wake-ups that carry an id. What is to be done, and whether, stands in the database."""

from celery import shared_task

from agents.runs import execution, memory


@shared_task
def execute(run_id: str) -> None:
    """Carry out a run, then bring the summary of its thread up to date."""
    if thread_id := execution.execute(run_id):
        memory.summarise(thread_id)


@shared_task
def summarise(thread_id: str) -> None:
    memory.summarise(thread_id)
