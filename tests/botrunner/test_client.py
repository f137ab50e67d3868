"""What nio makes of odd answers, and what is made of nio. Against a scripted homeserver."""

import asyncio
import contextlib
import http.server
import itertools
import json
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import vodozemac
from django.utils import timezone
from nio.crypto import InboundGroupSession

from botrunner.incoming import members
from botrunner.matrix import client
from botrunner.matrix.client import Homeserver
from botrunner.matrix.errors import (
    AnswerTooLong,
    KeysOutdated,
    LoginRefused,
    MatrixError,
    TokenRefused,
)
from botrunner.matrix.events import TimelineEvent
from botrunner.models import LeaseLost, Session
from tests.botrunner.scenes import ALICE, ME, event


class Scripted(http.server.ThreadingHTTPServer):
    """Answers as `answers` says for the last words of a path; keeps what was asked."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers: dict[str, tuple[int, Any]] = {}
        self.asked: list[tuple[str, str, Any]] = []
        # Of an answer in pieces: how many bytes were taken, and that it is over.
        self.sent = 0
        self.told = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Scripted

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        length = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(length) or b"null")
        self.server.asked.append((self.command, self.path, body))
        status, answer = next(
            (answer for words, answer in self.server.answers.items() if words in path),
            (404, {"errcode": "M_NOT_FOUND", "error": "no"}),
        )
        if callable(answer):
            self.tell(answer())
            return
        data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def tell(self, pieces: Iterator[bytes]) -> None:
        """Without saying how long it is, for as long as the client reads."""
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.server.sent = 0
        with contextlib.suppress(OSError):
            for piece in pieces:
                self.wfile.write(piece)
                self.server.sent += len(piece)
        self.server.told.set()

    do_POST = do_PUT = do_GET  # noqa: N815

    def log_message(self, *args: Any) -> None: ...


@pytest.fixture
def server() -> Iterator[Scripted]:
    server = Scripted()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def use(server: Scripted, tmp_path: Path) -> Callable[..., Any]:
    """Run a scene with a client that is logged in."""

    def run(scene: Callable[[Homeserver], Any]) -> Any:
        async def play() -> Any:
            homeserver = Homeserver(server.url, "bot-runner", tmp_path)
            homeserver.nio.restore_login(ME, "DEVICE", "token")
            try:
                return await scene(homeserver)
            finally:
                await homeserver.close()

        return asyncio.run(asyncio.wait_for(play(), 120))

    return run


def room(*events: Any, **timeline: Any) -> dict[str, Any]:
    return {"timeline": {"events": list(events), "limited": False, "prev_batch": "p"} | timeline}


async def sync(homeserver: Homeserver) -> Any:
    return await homeserver.sync("s0", seconds=0, filter_={})


@pytest.mark.parametrize("path", ["/sync", "/messages", "/joined_members", "/keys/query"])
def test_an_answer_without_end_is_not_read_to_its_end(
    server: Scripted, use: Any, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    """By nio neither."""
    monkeypatch.setattr(client, "MAX_ANSWER_BYTES", 2 * 1024 * 1024)
    # What is on its way between two sockets when the client closes, many times over.
    most = 64 * 1024 * 1024
    endless = itertools.repeat(b'{"next_batch": "' + 65536 * b"x", most // 65536)
    server.answers[path] = (200, lambda: endless)

    async def scene(homeserver: Homeserver) -> None:
        homeserver.know_room("!a", encrypted=True)
        calls = {
            "/sync": lambda: sync(homeserver),
            "/messages": lambda: homeserver.messages("!a", "s0", None),
            "/joined_members": lambda: homeserver._call(homeserver.nio.joined_members("!a")),
            "/keys/query": lambda: homeserver.request("POST", "/_matrix/client/v3/keys/query", {}),
        }
        with pytest.raises(AnswerTooLong, match="is longer than 2 MiB") as refused:
            await calls[path]()
        assert path in str(refused.value)

    use(scene)
    assert server.told.wait(20)
    assert server.sent < most / 2


def test_a_join_that_is_not_answered_is_not_waited_for(server: Scripted, use: Any) -> None:
    free = threading.Event()

    def silence() -> Iterator[bytes]:
        free.wait(60)
        yield b"{}"

    server.answers["/join/!silent:elsewhere"] = (200, silence)
    server.answers["/join/!good"] = (200, {"room_id": "!good"})

    async def scene(homeserver: Homeserver) -> None:
        waiting = asyncio.create_task(homeserver.join("!silent:elsewhere", seconds=1))
        await homeserver.join("!good", seconds=10)
        assert not waiting.done()
        with pytest.raises(client.MatrixTimeout):
            await waiting
        server.server_close()  # nobody is there
        server.shutdown()
        with pytest.raises(client.MatrixError) as away:
            await homeserver.join("!good", seconds=10)
        assert not isinstance(away.value, client.MatrixTimeout)

    try:
        use(scene)
    finally:
        free.set()


def test_an_answer_as_long_as_may_be_is_read(server: Scripted, use: Any) -> None:
    filling = {"presence": {"events": ["x" * 5_000_000]}}
    server.answers["/sync"] = (200, {"next_batch": "s1", "rooms": {}} | filling)
    assert use(sync).next_batch == "s1"


def test_one_odd_room_does_not_poison_the_sync(server: Scripted, use: Any) -> None:
    sealed = event({}, type="m.room.encrypted")
    odd = room({"content": 1}, sealed) | {"summary": [], "ephemeral": 7, "account_data": "?"}
    good = event("Hello")
    rooms = {"join": {"!odd": odd, "!good": room(good), "!sealed": room(sealed)}}
    server.answers["/sync"] = (200, {"next_batch": "s1", "rooms": rooms, "to_device": {}})

    async def scene(homeserver: Homeserver) -> Any:
        news = await sync(homeserver)
        # What is not encrypted is none of nio's business.
        assert set(homeserver.nio.rooms) == {"!sealed"}
        return news

    news = use(scene)
    assert news.next_batch == "s1"
    assert news.rooms("join")["!good"]["timeline"]["events"] == [good]


DEEP = 5000
SENDER_KEY = "sender-key"


def sealed(homeserver: Homeserver, payload: str, **content: Any) -> dict[str, Any]:
    """An event of an encrypted room whose key the bot has."""
    group = vodozemac.GroupSession()
    session = InboundGroupSession(group.session_key.to_base64(), "x", SENDER_KEY, "!a")
    homeserver.nio.olm.inbound_group_store.add(session)
    content = {
        "algorithm": "m.megolm.v1.aes-sha2",
        "sender_key": SENDER_KEY,
        "session_id": session.id,
        "device_id": "HERS",
        "ciphertext": group.encrypt(payload.encode()).to_base64(),
        **content,
    }
    return event(content, type="m.room.encrypted")


@pytest.mark.parametrize(
    ("payload", "content"),
    [
        ("[]", {}),
        ("5", {}),
        ('"x"', {}),
        ("9" * 5000, {}),
        ("[" * DEEP + "]" * DEEP, {}),
        ("{}", {"sender_key": ""}),
        ("{}", {"session_id": ""}),
    ],
    ids=["list", "number", "text", "long number", "deep", "no sender key", "no session"],
)
def test_one_odd_sealed_event_does_not_stop_the_bot(
    server: Scripted, use: Any, payload: str, content: dict[str, str]
) -> None:
    async def scene(homeserver: Homeserver) -> None:
        words = {"type": "m.room.message", "content": {"msgtype": "m.text", "body": "Hello"}}
        odd = sealed(homeserver, payload, **content)
        good = sealed(homeserver, json.dumps(words))
        join = {"join": {"!a": room(odd, good)}}
        server.answers["/sync"] = (200, {"next_batch": "s1", "rooms": join})
        news = await sync(homeserver)
        assert set(news.decrypted) == {good["event_id"]}
        # Its key may as well come later.
        assert homeserver.decrypt("!a", odd) is None
        assert homeserver.decrypt("!a", good)

    use(scene)


def test_what_a_member_has_sealed_is_no_piece_of_state_and_no_redaction(
    server: Scripted, use: Any
) -> None:
    """No homeserver has seen it, and none has allowed it."""
    outsider = "@outsider:localhost"
    joins = {"content": {"membership": "join"}, "state_key": outsider, "unsigned": {}}
    takes_back = {"content": {"redacts": "$a"}, "redacts": "$a"}

    async def scene(homeserver: Homeserver) -> None:
        join = sealed(homeserver, json.dumps({"type": "m.room.member", **joins}))
        redaction = sealed(homeserver, json.dumps({"type": "m.room.redaction", **takes_back}))
        # What a sync has opened, and what is opened once the key has come.
        later = {each["event_id"]: homeserver.decrypt("!a", each) for each in (join, redaction)}
        rooms = {"join": {"!a": room(join, redaction)}}
        server.answers["/sync"] = (200, {"next_batch": "s1", "rooms": rooms})
        news = await sync(homeserver)
        assert set(news.decrypted) == set(later)
        for found in (news.decrypted, later):
            first, second = found[join["event_id"]], found[redaction["event_id"]]
            assert first
            assert second
            moments = {event_id: timezone.now() for event_id in found}
            assert not members.changes([first, second], moments)
            assert TimelineEvent.parse(second).redacts is None  # type: ignore[union-attr]
        # The keys of the room are sealed for its members alone.
        assert outsider not in homeserver.nio.rooms["!a"].users

    use(scene)


def test_one_odd_event_to_the_device_does_not_stop_the_bot(server: Scripted, use: Any) -> None:
    async def scene(homeserver: Homeserver) -> str:
        own_key = homeserver.nio.olm.account.identity_keys["curve25519"]
        content = {
            "algorithm": "m.olm.v1.curve25519-aes-sha2",
            "sender_key": SENDER_KEY,
            "ciphertext": {own_key: {"type": 0, "body": "?"}},
        }
        odd = {"type": "m.room.encrypted", "sender": ALICE, "content": content}
        server.answers["/sync"] = (200, {"next_batch": "s1", "to_device": {"events": [odd]}})
        return str((await sync(homeserver)).next_batch)

    assert use(scene) == "s1"


def test_an_event_of_many_levels_does_not_stop_the_bot(server: Scripted, use: Any) -> None:
    deep: Any = []
    for _ in range(300):
        deep = [deep]
    join = {"join": {"!a": room(event({"deep": deep}, type="m.room.encrypted"))}}
    server.answers["/sync"] = (200, {"next_batch": "s1", "rooms": join})

    assert use(sync).next_batch == "s1"


@pytest.mark.parametrize(
    ("status", "body", "code"),
    [
        (502, b"<html>Bad gateway</html>", "UNREADABLE"),
        (200, b"<html>Login here</html>", "UNREADABLE"),
        (200, {}, "NO_NEXT_BATCH"),
        (500, {"errcode": "M_UNKNOWN", "error": "broken"}, "M_UNKNOWN"),
        (429, {"errcode": "M_LIMIT_EXCEEDED", "retry_after_ms": 1500}, "M_LIMIT_EXCEEDED"),
    ],
)
def test_a_failed_sync_is_told_at_once(
    server: Scripted, use: Any, status: int, body: Any, code: str
) -> None:
    server.answers["/sync"] = (status, body)
    with pytest.raises(MatrixError) as caught:
        use(sync)
    assert caught.value.code == code
    assert not caught.value.permanent
    assert caught.value.retry_after == (1.5 if status == 429 else None)
    assert len(server.asked) == 1


@pytest.mark.parametrize("soft", [False, True])
def test_a_revoked_token_is_told_apart(server: Scripted, use: Any, soft: bool) -> None:
    refusal = {"errcode": "M_UNKNOWN_TOKEN", "error": "revoked", "soft_logout": soft}
    server.answers["/sync"] = (401, refusal)

    async def scene(homeserver: Homeserver) -> None:
        with pytest.raises(TokenRefused):
            await sync(homeserver)
        assert homeserver.token_refused.is_set()

    use(scene)


def test_a_homeserver_that_is_away_is_told_at_once(tmp_path: Path) -> None:
    async def scene() -> None:
        homeserver = Homeserver("http://127.0.0.1:1", "bot-runner", tmp_path)
        with pytest.raises(MatrixError, match="UNREACHABLE"):
            await homeserver.login("x", "DEVICE")
        await homeserver.close()

    started = time.monotonic()
    asyncio.run(scene())
    assert time.monotonic() - started < 30


def test_a_wrong_password_is_told_apart(server: Scripted, use: Any) -> None:
    server.answers["/login"] = (403, {"errcode": "M_FORBIDDEN", "error": "Invalid password"})

    async def scene(homeserver: Homeserver) -> None:
        with pytest.raises(LoginRefused):
            await homeserver.login("wrong", "DEVICE")

    use(scene)
    # The device is the stored one, so that no login leaves a new one behind.
    assert server.asked[0][2]["device_id"] == "DEVICE"


def test_an_answer_that_ends_where_the_last_one_did_is_read_again(
    server: Scripted, use: Any
) -> None:
    """It was not kept the first time: nio would skip it."""
    join = {"join": {"!a": room(event({}, type="m.room.encrypted"))}}
    server.answers["/sync"] = (200, {"next_batch": "s1", "rooms": join})

    async def scene(homeserver: Homeserver) -> set[str]:
        await sync(homeserver)
        homeserver.nio.rooms.clear()
        await sync(homeserver)
        return set(homeserver.nio.rooms)

    assert use(scene) == {"!a"}


def test_one_time_keys_are_refilled_when_none_is_left(server: Scripted, use: Any) -> None:
    counts = {"signed_curve25519": 0}
    server.answers["/sync"] = (
        200,
        {"next_batch": "s1", "device_one_time_keys_count": counts, "rooms": {}},
    )
    counted = {"one_time_key_counts": {"signed_curve25519": 50, "curve25519": 0}}
    server.answers["/keys/upload"] = (200, counted)

    async def scene(homeserver: Homeserver) -> None:
        await homeserver.maintain_keys()  # the first keys
        await sync(homeserver)
        await homeserver.maintain_keys()

    use(scene)
    uploads = [body for _, path, body in server.asked if "/keys/upload" in path]
    assert len(uploads) == 2
    assert len(uploads[1]["one_time_keys"]) > 0


def test_a_crash_during_the_upload_of_keys_leaves_none_that_nobody_can_use(
    server: Scripted, use: Any
) -> None:
    """The homeserver may have taken them, and refuses others by the same names for good."""
    server.answers["/keys/upload"] = (502, b"")

    async def crash(homeserver: Homeserver) -> None:
        with pytest.raises(MatrixError):
            await homeserver.maintain_keys()

    use(crash)
    counted = {"one_time_key_counts": {"signed_curve25519": 50, "curve25519": 0}}
    server.answers["/keys/upload"] = (200, counted)
    use(lambda homeserver: homeserver.maintain_keys())
    first, second = (body for _, path, body in server.asked if "/keys/upload" in path)
    assert first["device_keys"] == second["device_keys"]
    assert first["one_time_keys"].items() <= second["one_time_keys"].items()


def test_who_was_frozen_while_another_took_over_writes_and_sends_nothing(
    server: Scripted, tmp_path: Path
) -> None:
    """Its keys are those of the past: written down, they would make the device deaf."""
    counted = {"one_time_key_counts": {"signed_curve25519": 50, "curve25519": 0}}
    encryption = event({"algorithm": "m.megolm.v1.aes-sha2"}, type="m.room.encryption")
    join = {"join": {"!a": room({**encryption, "state_key": ""})}}
    server.answers |= {
        "/keys/upload": (200, counted),
        "/sync": (200, {"next_batch": "s1", "rooms": join}),
        "/send/": (200, {"event_id": "$sent"}),
    }

    def client() -> Homeserver:
        homeserver = Homeserver(server.url, "bot-runner", tmp_path)
        homeserver.nio.restore_login(ME, "DEVICE", "token")
        return homeserver

    async def scene() -> None:
        frozen = client()
        leader = client()
        content = {"body": "x", "msgtype": "m.text"}
        for step in (
            frozen.maintain_keys,
            lambda: sync(frozen),
            lambda: frozen.send("!plain:x", content, "t1"),
        ):
            with pytest.raises(LeaseLost):
                await step()
        assert not [path for _, path, _ in server.asked if "/sync" not in path]
        await leader.maintain_keys()
        await sync(leader)
        await leader.send("!plain:x", content, "t1")
        await frozen.close()
        await leader.close()

    asyncio.run(scene())


def test_keys_of_the_past_are_told_from_those_that_were_in_use(
    server: Scripted, use: Any, tmp_path: Path
) -> None:
    session = Session(user_id=ME, device_id="DEVICE")

    async def scene(homeserver: Homeserver) -> None:
        session.key_writes = homeserver.key_writes
        assert homeserver.has_keys_of(session)
        homeserver.nio.olm.save_account()
        assert homeserver.has_keys_of(session)  # what was not written down yet
        session.key_writes = homeserver.key_writes + 1
        assert not homeserver.has_keys_of(session)

    use(scene)
    [path] = tmp_path.glob("*.db")
    with sqlite3.connect(path) as database:
        database.execute("DROP TABLE keeper")
    session.key_writes = 0
    homeserver = Homeserver(server.url, "bot-runner", tmp_path)
    assert homeserver.has_keys_of(session)  # from before they were counted
    path.write_bytes(b"What a broken backup may leave. " * 100)
    assert not homeserver.has_keys_of(session)
    path.unlink()
    assert not homeserver.has_keys_of(session)
    asyncio.run(homeserver.close())


def test_a_homeserver_that_has_later_keys_is_told_apart(server: Scripted, use: Any) -> None:
    """As after database and key store were restored together."""
    error = "One time key signed_curve25519:AAAAAQ already exists."
    server.answers["/keys/upload"] = (400, {"errcode": "M_UNKNOWN", "error": error})

    async def scene(homeserver: Homeserver) -> None:
        with pytest.raises(KeysOutdated):
            await homeserver.maintain_keys()

    use(scene)


def test_plain_text_is_sent_only_after_the_room_has_proven_plain(
    server: Scripted, use: Any
) -> None:
    server.answers["/send/"] = (200, {"event_id": "$sent"})

    async def scene(homeserver: Homeserver) -> None:
        for _ in range(2):
            await homeserver.send("!plain:x", {"body": "x", "msgtype": "m.text"}, "t1")

    use(scene)
    kinds = ["encryption" if "m.room.encryption" in path else "send" for _, path, _ in server.asked]
    assert kinds == ["encryption", "send", "send"]


def test_plain_text_never_goes_into_an_encrypted_room(server: Scripted, use: Any) -> None:
    """The room is encrypted, and the bot does not know."""
    server.answers["/state/m.room.encryption"] = (200, {"algorithm": "m.megolm.v1.aes-sha2"})
    server.answers["/joined_members"] = (200, {"joined": {ALICE: {}, ME: {}}})
    server.answers["/keys/query"] = (200, {"device_keys": {ALICE: {}, ME: {}}, "failures": {}})
    server.answers["/send/"] = (200, {"event_id": "$sent"})

    async def scene(homeserver: Homeserver) -> None:
        await homeserver.send("!secret:x", {"body": "secret", "msgtype": "m.text"}, "t1")

    use(scene)
    [(path, body)] = [(path, body) for _, path, body in server.asked if "/send/" in path]
    assert "/m.room.encrypted/t1" in path
    assert "secret" not in json.dumps(body).replace("!secret:x", "")


def test_encryption_that_only_the_state_beside_a_gap_tells_of_is_respected(
    server: Scripted, use: Any
) -> None:
    encryption = {"type": "m.room.encryption", "state_key": "", "sender": ALICE, "content": {}}
    encryption |= {"event_id": "$e", "origin_server_ts": 1}
    encryption["content"] = {"algorithm": "m.megolm.v1.aes-sha2"}
    gap = room(event("Hello"), limited=True) | {"state": {"events": [encryption]}}
    server.answers["/sync"] = (200, {"next_batch": "s1", "rooms": {"join": {"!a": gap}}})

    async def scene(homeserver: Homeserver) -> bool:
        homeserver.know_room("!a", encrypted=False)
        await sync(homeserver)
        return homeserver.is_encrypted("!a")

    assert use(scene)


def test_when_it_cannot_be_known_whether_a_room_is_plain_nothing_is_sent(
    server: Scripted, use: Any
) -> None:
    server.answers["/state/m.room.encryption"] = (502, b"")

    async def scene(homeserver: Homeserver) -> None:
        with pytest.raises(MatrixError):
            await homeserver.send("!room:x", {"body": "x", "msgtype": "m.text"}, "t1")

    use(scene)
    assert not [path for _, path, _ in server.asked if "/send/" in path]
