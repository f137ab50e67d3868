from celery import shared_task

from console import bulk


@shared_task
def carry_on(job_id: int) -> None:
    bulk.carry_on(job_id)
