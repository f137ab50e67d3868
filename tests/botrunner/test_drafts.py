"""An answer in its room while it is written. With a real Redis, a real worker's side and a real model
endpoint; the homeserver is a list of what it was sent."""

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest
from asgiref.sync import async_to_sync
from django.db import connections
from redis import Redis

from agents.events import publisher
from agents.models import Run
from agents.runs import actions, execution
from agents.worker.bootstep import Loop
from botrunner.aio import database_sync_to_async
from botrunner.incoming import handling
from botrunner.matrix.errors import MatrixError
from botrunner.matrix.events import REPLY_FIELD
from botrunner.models import Reply
from botrunner.outgoing import content as rendering
from botrunner.outgoing import drafts, queue
from botrunner.outgoing.drafts import Drafts
from botrunner.outgoing.sender import ReplySender
from tests.botrunner.scenes import ME, ROOM, command, event, session, take_in
from tests.fakes.llm import FakeLLM, Paced, held
from tests.fakes.llm import Reply as Answer

pytestmark = pytest.mark.django_db(transaction=True)

PACE = 0.15
WORDS = ("**one** ", "two ", "three ", "four ", "five ", "six ", "seven ", "eight")
TALK = Answer(WORDS, delta_latency=0.08)


@pytest.fixture(autouse=True)
def _quick(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Less patience; and a worker that hears what is called for."""
    for name, seconds in (("PATIENCE", 0.02), ("PACE", PACE), ("PAUSE", 0.05)):
        monkeypatch.setattr(drafts, f"{name}_SECONDS", seconds)
    loop = Loop("listener", publisher.current().listen)
    loop.start()
    until = time.monotonic() + 60
    while not dict(redis.pubsub_numsub(publisher.control_channel()))[
        publisher.control_channel().encode()
    ]:
        assert time.monotonic() < until
        time.sleep(0.01)
    yield
    loop.stopping.set()
    loop.join(60)
    connections.close_all()


class Homeserver:
    """Like a real one it takes a transaction once, and is told apart from one that is away."""

    user_id = ME
    device_id = "DEVICE"

    def __init__(self) -> None:
        self.sent: list[tuple[str, dict[str, Any]]] = []
        self.times: list[float] = []
        self.transactions: dict[str, str] = {}
        self.asked: list[str] = []
        self.refused_at = 0.0
        # What happens to the next: an error is raised, and after `"lost"` nothing is told of it.
        self.fate: list[MatrixError | str] = []
        self.slow = asyncio.Event()
        self.slow.set()

    async def send(self, room_id: str, content: dict[str, Any], transaction: str) -> str:
        assert room_id == ROOM
        self.asked.append(transaction)
        await self.slow.wait()
        fate = self.fate.pop(0) if self.fate else None
        if isinstance(fate, MatrixError):
            self.refused_at = asyncio.get_running_loop().time()
            raise fate
        if transaction not in self.transactions:
            self.transactions[transaction] = f"$sent{len(self.sent)}"
            self.sent.append((self.transactions[transaction], content))
            self.times.append(asyncio.get_running_loop().time())
        if fate == "lost":
            raise MatrixError("UNREACHABLE")
        return self.transactions[transaction]

    async def messages(self, *asked: Any) -> tuple[list[dict[str, Any]], str]:
        events = [{**event(content, ME), "event_id": each} for each, content in self.sent]
        return events[::-1], ""

    @property
    def seen(self) -> dict[str, dict[str, Any]]:
        """What a reader's client shows: each message in its last edition."""
        shown: dict[str, dict[str, Any]] = {}
        for event_id, content in self.sent:
            relation = content["m.relates_to"]
            if relation.get("rel_type") == "m.replace":
                shown[relation["event_id"]] = content["m.new_content"]
            else:
                shown[event_id] = content
        return shown

    @property
    def bodies(self) -> list[str]:
        return [content["body"] for content in self.seen.values()]

    @property
    def editions(self) -> list[str]:
        return [content.get("m.new_content", content)["body"] for _, content in self.sent]


class Stage:
    """A bot of which only what is about replies is at work."""

    def __init__(self) -> None:
        self.homeserver: Any = Homeserver()
        self.row = session()
        self.workers: list[threading.Thread] = []

    async def __aenter__(self) -> "Stage":
        self._start()
        return self

    def _start(self) -> None:
        self.drafts = Drafts(self.homeserver, self.row)
        self.sender = ReplySender(self.homeserver, self.row, self.drafts)

    async def __aexit__(self, *exc: object) -> None:
        self.homeserver.slow.set()
        await self.sender.close()
        await self.drafts.close()
        for worker in self.workers:
            await asyncio.to_thread(worker.join, 60)

    async def kill(self) -> None:
        """What is being sent is not waited for."""
        tasks = [draft.task for draft in self.drafts._drafts.values() if draft.task]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.drafts._subscriber.close()

    async def restart(self) -> None:
        await self.kill()
        self._start()
        await self.drafts.follow()

    async def ask(self, content: Any = "Hello") -> str:
        """The run."""
        await database_sync_to_async(take_in)(self.row, event(content))
        await self.drafts.follow()
        return str(await database_sync_to_async(lambda: Run.objects.latest("position").pk)())

    def work(self, run_id: str) -> threading.Thread:
        """A worker beside the bot."""

        def carry_out() -> None:
            try:
                execution.execute(run_id)
            finally:
                connections.close_all()

        worker = threading.Thread(target=carry_out, daemon=True)
        self.workers.append(worker)
        worker.start()
        return worker

    async def until(self, condition: Callable[[], Any], seconds: float = 60) -> None:
        async with asyncio.timeout(seconds):
            while not condition():
                await asyncio.sleep(0.005)

    async def told(self) -> None:
        """Until all that ended is told, as the bot's sweep does it."""
        async with asyncio.timeout(60):
            while await database_sync_to_async(lambda: Reply.objects.unfinished().exists())():
                await self.sender.compose()
                await asyncio.sleep(0.02)
        await self.sender.close()


def match(stage: Stage, drafts: int = 1, *, answer: Answer = TALK, more: int = 4) -> Paced:
    """The answer by a model that says `more` steps, two to a word, and goes on once the bot has sent a
    draft, so many times: on a busy machine all of it would be said before the first."""
    asked, before = stage.homeserver.asked, len(stage.homeserver.asked)
    return Paced(answer, lambda step: len(asked) - before >= min(step // more, drafts))


def play(scene: Callable[[Stage], Awaitable[None]]) -> None:
    async def whole() -> None:
        async with stage:
            await asyncio.wait_for(scene(stage), 120)

    command()
    stage = Stage()
    async_to_sync(whole)()


def answer_of(run_id: str) -> str:
    run = Run.objects.select_related("answer").get(pk=run_id)
    assert run.answer
    return run.answer.content


def test_the_answer_is_in_the_room_while_it_is_written(model: FakeLLM) -> None:
    may_end = threading.Event()

    async def scene(stage: Stage) -> None:
        homeserver = stage.homeserver
        talk = match(stage, 3)
        model.script(held(talk, may_end, 15))
        run_id = await stage.ask()
        worker = stage.work(run_id)
        await stage.until(lambda: len(homeserver.sent) >= 3)
        assert worker.is_alive()
        may_end.set()
        first = homeserver.editions[0]
        assert first
        assert "eight" not in first
        await stage.told()
        assert all("".join(WORDS).startswith(words.rstrip()) for words in homeserver.editions)

        # One message, which is in the end what it would have been without drafts.
        [event_id] = homeserver.seen
        reply = await database_sync_to_async(
            Reply.objects.select_related("message", "run__answer").get
        )()
        [whole] = await database_sync_to_async(queue.contents)(reply)
        assert whole["body"] == await database_sync_to_async(answer_of)(run_id)
        said, relation = homeserver.sent[0][1], whole.pop("m.relates_to")
        assert said["m.relates_to"] == relation
        assert said[REPLY_FIELD] == {**whole[REPLY_FIELD], "draft": True}
        assert homeserver.seen[event_id] == whole
        assert (reply.event_ids, reply.draft_id, reply.status) == ([event_id], event_id, "sent")
        assert {edit["msgtype"] for _, edit in homeserver.sent} == {"m.text"}
        pauses = [b - a for a, b in zip(homeserver.times, homeserver.times[1:-1], strict=False)]
        assert min(pauses) >= PACE

    play(scene)


def test_an_answer_that_comes_at_once_is_sent_once(
    model: FakeLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drafts, "PATIENCE_SECONDS", 5)
    model.script(Answer("Quick"))

    async def scene(stage: Stage) -> None:
        await asyncio.to_thread(stage.work(await stage.ask()).join, 60)
        await stage.told()
        assert [content["body"] for _, content in stage.homeserver.sent] == ["Quick"]

    play(scene)


def test_in_a_thread_the_draft_is_there_too(model: FakeLLM) -> None:
    thread = {"rel_type": "m.thread", "event_id": "$root"}

    async def scene(stage: Stage) -> None:
        model.script(match(stage, 2))
        content = {"msgtype": "m.text", "body": "Hi", "m.relates_to": thread}
        stage.work(await stage.ask(content))
        await stage.told()
        assert len(stage.homeserver.sent) > 2
        relation = stage.homeserver.sent[0][1]["m.relates_to"]
        assert relation.items() >= thread.items()

    play(scene)


@pytest.mark.parametrize("at", ["between", "sending", "unknown", "unknown for long", "at the end"])
def test_after_a_kill_it_goes_on_with_the_same_message(model: FakeLLM, at: str) -> None:
    async def scene(stage: Stage) -> None:
        homeserver = stage.homeserver
        model.script(match(stage, 2 if at == "between" else 1))
        if at.startswith("unknown"):  # it arrived, and the bot was not told
            homeserver.fate = ["lost"]
        run_id = await stage.ask()
        if at == "sending":  # nothing of it has arrived
            homeserver.slow.clear()
        worker = stage.work(run_id)
        await stage.until(lambda: homeserver.asked)
        if at == "between":
            await stage.until(lambda: len(homeserver.sent) >= 2)
        if at == "unknown for long":
            await stage.kill()
        if at in ("unknown for long", "at the end"):
            await asyncio.to_thread(worker.join, 60)
        await stage.restart()
        homeserver.slow.set()
        await stage.told()
        assert homeserver.bodies == [await database_sync_to_async(answer_of)(run_id)]

    play(scene)


def test_another_device_goes_on_with_the_message_it_finds(model: FakeLLM) -> None:
    async def scene(stage: Stage) -> None:
        homeserver = stage.homeserver
        model.script(match(stage))
        homeserver.fate = ["lost"]
        run_id = await stage.ask()
        worker = stage.work(run_id)
        await stage.until(lambda: homeserver.sent)
        homeserver.device_id, homeserver.transactions = "ANOTHER", {}
        await stage.restart()
        await asyncio.to_thread(worker.join, 60)
        await stage.told()
        assert homeserver.bodies == [await database_sync_to_async(answer_of)(run_id)]

    play(scene)


def test_nothing_comes_after_the_last_edit(model: FakeLLM) -> None:
    """The reply waits for the edit that is on its way; one whose fate is not known is sent again."""

    async def scene(stage: Stage) -> None:
        homeserver = stage.homeserver
        model.script(match(stage, 2))
        run_id = await stage.ask()
        worker = stage.work(run_id)
        await stage.until(lambda: homeserver.sent)
        homeserver.slow.clear()
        await stage.until(lambda: len(homeserver.asked) >= 2)
        unsure = homeserver.asked[-1]
        homeserver.fate = [MatrixError("UNREACHABLE")]
        await asyncio.to_thread(worker.join, 60)
        await stage.sender.compose([run_id])
        homeserver.slow.set()
        await stage.told()
        assert homeserver.asked[-3:] == [unsure, unsure, f"{run_id}.0.final"]
        assert homeserver.bodies == [await database_sync_to_async(answer_of)(run_id)]

    play(scene)


def test_under_a_rate_limit_it_tells_less_often_and_the_answer_is_exact(model: FakeLLM) -> None:
    async def scene(stage: Stage) -> None:
        homeserver = stage.homeserver
        model.script(match(stage, 2))
        run_id = await stage.ask()
        stage.work(run_id)
        await stage.until(lambda: homeserver.sent)
        limited = MatrixError("M_LIMIT_EXCEEDED", status=429, retry_after=0.3)
        homeserver.fate = [limited]
        await stage.until(lambda: len(homeserver.asked) >= 2)
        await stage.told()
        assert homeserver.bodies == [await database_sync_to_async(answer_of)(run_id)]
        drafted = [each for each in homeserver.asked if not each.endswith(".final")]
        later = homeserver.times[1 : len(drafted) - 1]
        assert all(time - homeserver.refused_at >= 0.3 for time in later)

    play(scene)


@pytest.mark.parametrize("status", [403, 400])
def test_what_the_room_does_not_take_is_told_at_the_end(model: FakeLLM, status: int) -> None:
    async def scene(stage: Stage) -> None:
        model.script(match(stage))
        stage.homeserver.fate = [MatrixError("M_UNKNOWN", status=status)]
        run_id = await stage.ask()
        stage.work(run_id)
        await stage.told()
        assert stage.homeserver.bodies == [await database_sync_to_async(answer_of)(run_id)]
        assert stage.homeserver.asked == [f"{run_id}.0"] * 2 + [f"{run_id}.0.final"]

    play(scene)


def test_a_new_attempt_takes_the_place_of_the_old_ones_text() -> None:
    async def scene(stage: Stage) -> None:
        run_id = await stage.ask()
        for attempt, words in ((1, "wrong"), (2, "right")):
            with publisher.current().feed(run_id, attempt, stop=lambda: None) as feed:
                feed.step_started("model", "m")
                feed.text(words)
                await stage.until(lambda words=words: stage.homeserver.bodies == [words])

    play(scene)


def test_what_was_written_before_a_tool_was_called_is_not_the_answer() -> None:
    async def scene(stage: Stage) -> None:
        run_id = await stage.ask()
        with publisher.current().feed(run_id, 1, stop=lambda: None) as feed:
            for words in ("Let me see", "It is so"):
                feed.step_started("model", "m")
                feed.text(words)
                await stage.until(lambda words=words: stage.homeserver.bodies == [words])

    play(scene)


def test_of_what_has_holes_nothing_is_shown(redis: Redis) -> None:
    async def scene(stage: Stage) -> None:
        run_id = await stage.ask()
        with publisher.current().feed(run_id, 1, stop=lambda: None) as feed:
            feed.step_started("model", "m")
            feed.text("one ")
            await stage.until(lambda: stage.homeserver.bodies == ["one "])
            feed.start()
            with feed._lock:
                feed._number += 1  # an event that is nowhere
            feed.text("three ")
            feed.step_started("model", "m")
            feed.text("anew")
            await stage.until(lambda: len(stage.homeserver.sent) == 2)
            assert stage.homeserver.bodies == ["anew"]

    play(scene)


def test_of_a_long_answer_only_the_first_part_is_written_live(
    model: FakeLLM, monkeypatch: pytest.MonkeyPatch, settings: Any
) -> None:
    settings.BOT_RUNNER_MAX_PARTS = 50
    monkeypatch.setattr(rendering, "MAX_CONTENT_BYTES", 3000)
    monkeypatch.setattr(drafts, "MAX_CONTENT_BYTES", 3000)
    lines = tuple(f"line {number}\n" for number in range(300))

    async def scene(stage: Stage) -> None:
        homeserver = stage.homeserver
        answer = Answer(lines, delta_latency=0.004)
        model.script(match(stage, 2, answer=answer, more=80))
        stage.work(await stage.ask())
        await stage.told()
        kept = "\n".join(homeserver.bodies)
        assert kept == "".join(lines).rstrip()
        parts = len(homeserver.bodies)
        assert parts > 2
        assert len(homeserver.sent) > parts + 1
        # The further parts came once.
        edited = {content["m.relates_to"].get("event_id") for _, content in homeserver.sent}
        assert edited == {None, homeserver.sent[0][0]}

    play(scene)


class TestCancelling:
    def written(self, end: Callable[[Stage, str], Awaitable[None]]) -> list[str]:
        """What is in the room after something has ended a run that was writing."""
        found: list[str] = []

        async def scene(stage: Stage) -> None:
            run_id = await stage.ask()
            with publisher.current().feed(run_id, 1, stop=lambda: None) as feed:
                feed.step_started("model", "m")
                feed.text("So far")
                await stage.until(lambda: stage.homeserver.sent)
                await end(stage, run_id)
            await stage.told()
            found.extend(stage.homeserver.bodies)

        play(scene)
        return found

    def test_what_was_written_stays_and_is_marked(self) -> None:
        async def cancel(stage: Stage, run_id: str) -> None:
            await database_sync_to_async(take_in)(stage.row, event("!cancel"))

        assert self.written(cancel) == ["So far\n\nThis was cancelled."]
        assert Run.objects.get().status == Run.Status.CANCELLED

    def test_by_taking_the_question_back(self) -> None:
        async def redact(stage: Stage, run_id: str) -> None:
            question = await database_sync_to_async(lambda: Reply.objects.get().message.event_id)()
            said = event({}, type="m.room.redaction", redacts=question)
            await database_sync_to_async(take_in)(stage.row, said)

        assert self.written(redact) == ["So far\n\nThis was cancelled."]

    def test_after_a_kill_what_the_worker_kept_is_marked(self, model: FakeLLM) -> None:
        cancelled = threading.Event()
        model.script(held(TALK, cancelled, 5))

        async def scene(stage: Stage) -> None:
            run_id = await stage.ask()
            worker = stage.work(run_id)
            await stage.until(lambda: stage.homeserver.sent)
            await stage.drafts.close()
            await database_sync_to_async(actions.cancel)(
                await database_sync_to_async(Run.objects.get)(pk=run_id)
            )
            cancelled.set()
            await asyncio.to_thread(worker.join, 60)
            await stage.restart()
            await stage.told()
            [body] = stage.homeserver.bodies
            words, _, sentence = body.partition("\n\n")
            assert words
            assert "".join(WORDS).startswith(words)
            assert sentence == "This was cancelled."

        play(scene)

    def test_a_failure_is_said_below_what_was_written(self) -> None:
        async def fail(stage: Stage, run_id: str) -> None:
            await database_sync_to_async(Run.objects.update)(
                status="failed", safe_error="The model is gone.", due_at=None
            )

        [body] = self.written(fail)
        assert body == "So far\n\nSorry, something went wrong. The model is gone."

    def test_of_a_run_that_is_asked_for_again_the_old_words_are_not_told(
        self, model: FakeLLM
    ) -> None:
        async def scene(stage: Stage) -> None:
            run_id = await stage.ask()
            with publisher.current().feed(run_id, 1, stop=lambda: None) as feed:
                await database_sync_to_async(execution.claim)(run_id)
                feed.step_started("model", "m")
                feed.text("old words")
                await stage.until(lambda: stage.homeserver.sent)
                await database_sync_to_async(take_in)(stage.row, event("!cancel"))
            await stage.told()
            cancelled = stage.homeserver.bodies
            await database_sync_to_async(actions.retry)(
                await database_sync_to_async(Run.objects.get)(pk=run_id)
            )
            await stage.sender.compose()
            await stage.drafts.follow()
            model.script(match(stage, 2))
            stage.work(run_id)
            await stage.told()
            assert stage.homeserver.bodies == [
                *cancelled,
                await database_sync_to_async(answer_of)(run_id),
            ]
            assert len(stage.homeserver.sent) > 4
            assert all("old" not in words for words in stage.homeserver.editions[2:])

        play(scene)


def test_while_redis_is_away_the_answer_comes_at_its_end(model: FakeLLM, settings: Any) -> None:
    settings.REDIS_URL = "redis://127.0.0.1:1/0"
    model.script(TALK)

    async def scene(stage: Stage) -> None:
        run_id = await stage.ask()
        stage.work(run_id)
        await stage.told()
        assert stage.homeserver.asked == [f"{run_id}.0"]

    play(scene)


def test_what_was_pending_is_acted_upon_once() -> None:
    """A question that is cancelled in the same breath says so once."""

    async def scene(stage: Stage) -> None:
        await database_sync_to_async(take_in)(stage.row, event("Hello"), event("!cancel"))
        await stage.drafts.follow()
        await stage.told()
        assert stage.homeserver.bodies == ["This was cancelled."]
        assert await database_sync_to_async(handling.pending)() == []

    play(scene)
