"""Limits of the connections of a process to PostgreSQL."""

# Two web processes, a worker and a bot runner are the smallest system.
PROCESSES = 4
MIN_SIZE = 2
# What this role may open in this database, without what is reserved for superusers.
PERMITTED = """
    SELECT least(
        current_setting('max_connections')::int
            - current_setting('superuser_reserved_connections')::int,
        (SELECT nullif(rolconnlimit, -1) FROM pg_roles WHERE rolname = current_user),
        (SELECT nullif(datconnlimit, -1) FROM pg_database WHERE datname = current_database())
    )
"""


def share(permitted: int) -> int:
    """Return how many of the permitted connections one process may open."""
    return max(MIN_SIZE, permitted // PROCESSES)
