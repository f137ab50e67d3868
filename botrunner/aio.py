"""The border between the event loop and the database, and waiting that can be ended."""

import asyncio
import functools
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ParamSpec, TypeVar

from asgiref.sync import sync_to_async
from django.db import close_old_connections

P = ParamSpec("P")
T = TypeVar("T")


def unit(function: Callable[P, T]) -> Callable[P, Awaitable[T]]:
    """A unit of database work, to be awaited. All run in one thread, one after another: on one
    connection, which is looked at before each."""

    @functools.wraps(function)
    def fresh(*args: P.args, **kwargs: P.kwargs) -> T:
        close_old_connections()
        return function(*args, **kwargs)

    return sync_to_async(fresh, thread_sensitive=True)


_beside = ThreadPoolExecutor(1, thread_name_prefix="beside")


def aside(function: Callable[P, T]) -> Callable[P, Awaitable[T]]:
    """Work that takes time and needs no database, to be awaited. All runs in one thread, which is
    neither the loop's nor the database's."""

    @functools.wraps(function)
    async def run(*args: P.args, **kwargs: P.kwargs) -> T:
        call = functools.partial(function, *args, **kwargs)
        return await asyncio.get_running_loop().run_in_executor(_beside, call)

    return run


def batched(items: list[T], size: int) -> list[list[T]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


async def pause(seconds: float, *until: asyncio.Event) -> None:
    """Wait, but no longer than until one of the events."""
    if seconds <= 0:
        return
    waits = [asyncio.create_task(event.wait()) for event in until]
    try:
        await asyncio.wait(waits, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()


async def unless(waiting: Coroutine[Any, Any, T], *until: asyncio.Event) -> T | None:
    """What is waited for; None when one of the events is first."""
    task = asyncio.create_task(waiting)
    waits = [asyncio.create_task(event.wait()) for event in until]
    try:
        await asyncio.wait([task, *waits], return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        for each in (task, *waits):
            each.cancel()
