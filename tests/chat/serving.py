"""The web server in the event loop of a test, for clients in other processes."""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import uvicorn

from config import asgi
from config.server.protocol import BoundedProtocol


@asynccontextmanager
async def serving() -> AsyncIterator[str]:
    """Start the server and yield its URL."""
    options = {"port": 0, "lifespan": "off", "ws": "none", "log_config": None, "access_log": False}
    options["http"] = BoundedProtocol
    server = uvicorn.Server(uvicorn.Config(asgi.application, host="127.0.0.1", **options))  # type: ignore[arg-type]
    task = asyncio.create_task(server.serve())
    try:
        async with asyncio.timeout(60):
            while not server.started:
                await asyncio.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        await task


async def output_of(
    *command: str, seconds: float, folder: Path, **environment: str
) -> tuple[int, str]:
    """Run a process and return its exit status and output."""
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env=os.environ | environment,
        cwd=folder,
    )
    try:
        async with asyncio.timeout(seconds):
            output, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return process.returncode or 0, output.decode()
