"""A conversation to be photographed."""

from __future__ import annotations

from tests.fakes.llm import Answer, Call, Hang, Reply, call_tool

# Asked before, to be seen in the list.
EARLIER = [
    "Plan a week of meals for two, with little meat",
    "Why is the sky blue, and sunsets red?",
    "Rename the columns of the export",
    "A short speech for the opening of the library",
]
QUESTION = "How do workers share a queue in a database without doing a job twice?"
ANSWER = """\
Three things are enough, and none of them is a lock that is held for long:

1. **Claim** a job with one conditional `UPDATE`. Of two workers that try at once, one changes a row.
2. Give the claim a **lease** that the worker extends. When it dies, the job is free again.
3. Number the claims, and let nobody write an outcome with a **number that is not the last**.

| what happens | without | with |
| --- | --- | --- |
| a worker dies | the job is lost | it begins again in seconds |
| a worker hangs and comes back | the job is done twice | its outcome is refused |
| two claim at once | both work | one does |

> The clock that counts is that of the database: those of the workers need not agree.
"""
NEXT = "Show me the claim in Django, please. And what time is it?"
CODE = """\
It is {time} UTC. The claim is one query, and its row count is the answer:

```python
def claim(self, job_id: int) -> bool:
    due = Job.objects.filter(pk=job_id, lease_until__lt=Now())
    return due.update(
        lease_until=Now() + LEASE,
        claim=F("claim") + 1,
    ) == 1
```

Both [PostgreSQL](https://www.postgresql.org/docs/) and SQLite do that without a lock of yours.
"""
LAST = "And a worker that was only slow?"
SLOW = (
    "It comes back with an outcome, and the number that it claimed with. Meanwhile another one has "
    "claimed the job, so that number is not the last any more: the UPDATE that would write the outcome "
    "changes no row. What the slow one did is thrown away, and"
)


def answer(call: Call) -> Answer:
    if call.last_user == QUESTION:
        return Reply(ANSWER, deltas=60, delta_latency=0.02)
    if call.last_user == LAST:
        return Hang(20, Reply(SLOW, deltas=20))
    if call.last_user != NEXT:
        return Reply("Gladly.")
    if call.messages[-1]["role"] != "tool":
        return call_tool("current_time")
    time = call.messages[-1]["content"].partition("T")[2][:5]
    return Reply(CODE.format(time=time), deltas=60, delta_latency=0.05)
