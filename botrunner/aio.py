"""The border between the event loop and blocking code, and waits that can be cut short."""

import asyncio
import functools
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ParamSpec, TypeVar

from asgiref.sync import sync_to_async
from django.db import close_old_connections

P = ParamSpec("P")
T = TypeVar("T")


def database_sync_to_async(function: Callable[P, T]) -> Callable[P, Awaitable[T]]:
    """Make database work awaitable. All of it runs in one thread, one call after another, on one
    connection, which is checked before each call."""

    @functools.wraps(function)
    def fresh(*args: P.args, **kwargs: P.kwargs) -> T:
        close_old_connections()
        return function(*args, **kwargs)

    return sync_to_async(fresh, thread_sensitive=True)


_cpu_thread = ThreadPoolExecutor(1, thread_name_prefix="cpu")


def cpu_sync_to_async(function: Callable[P, T]) -> Callable[P, Awaitable[T]]:
    """Make slow work that needs no database awaitable. All of it runs in one thread, which is neither
    the event loop's nor the database's."""

    @functools.wraps(function)
    async def run(*args: P.args, **kwargs: P.kwargs) -> T:
        call = functools.partial(function, *args, **kwargs)
        return await asyncio.get_running_loop().run_in_executor(_cpu_thread, call)

    return run


def batched(items: list[T], size: int) -> list[list[T]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


async def pause(seconds: float, *until: asyncio.Event) -> None:
    """Sleep, but no longer than until one of the events is set."""
    if seconds <= 0:
        return
    waits = [asyncio.create_task(event.wait()) for event in until]
    try:
        await asyncio.wait(waits, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()


async def run_until(call: Coroutine[Any, Any, T], *until: asyncio.Event) -> T | None:
    """Return the result of the call; None if one of the events is set first, which cancels it."""
    task = asyncio.create_task(call)
    waits = [asyncio.create_task(event.wait()) for event in until]
    try:
        await asyncio.wait([task, *waits], return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        for each in (task, *waits):
            each.cancel()
