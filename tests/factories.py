from typing import Any

from agents import inbox
from agents.models import Price, Run
from agents.usage import prices
from chat.models import Message, Thread
from realm.models import User


def user(name: str) -> User:
    return User.objects.create_matrix_user(f"@{name}:localhost")


def ask(content: str = "Hello", **extra: Any) -> Run:
    """A run as the inbox makes it."""
    fields = {"content": content, "source": Run.Source.HTTP, "threads": Thread.objects.all()}
    accepted = inbox.submit(inbox.Submission(**fields | extra))
    return Run.objects.select_related("thread", "message").get(pk=accepted.run_id)


def price(model: str = "gpt-4o-mini", **columns: Any) -> Price:
    made: Price = Price.objects.create(
        **{"model": model, "valid_from": "2026-01-01", "prompt": "0.15", "completion": "0.60"}
        | columns
    )
    prices.price_list.reset()
    return made


def conversation(turns: int, *, thread: Thread | None = None) -> Thread:
    """A thread of `turns` questions and answers, finished runs included."""
    thread = thread or Thread.objects.create()
    messages, runs = [], []
    for turn in range(turns):
        question = Message(
            thread=thread, position=2 * turn, role="user", content=f"question {turn}"
        )
        answer = Message(
            thread=thread, position=2 * turn + 1, role="assistant", content=f"answer {turn}"
        )
        messages += [question, answer]
        runs.append(
            Run(
                thread=thread,
                message=question,
                answer=answer,
                position=2 * turn,
                source=Run.Source.HTTP,
                model="gpt-4o-mini",
                status=Run.Status.COMPLETED,
                due_at=None,
            )
        )
    Message.objects.bulk_create(messages)
    Run.objects.bulk_create(runs)
    thread.turns = turns
    thread.save(update_fields=["turns"])
    return thread
