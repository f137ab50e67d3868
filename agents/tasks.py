"""Celery tasks. Each carries an id alone; the database has the work, and decides whether to do it."""

from celery import shared_task

from agents.runs import execution, memory


@shared_task
def execute(run_id: str) -> None:
    """Execute a run, then update the summary of its thread."""
    if thread_id := execution.execute(run_id):
        memory.summarise(thread_id)


@shared_task
def summarise(thread_id: str) -> None:
    memory.summarise(thread_id)
