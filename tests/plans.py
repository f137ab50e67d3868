from typing import Any

from django.db import connection


def explain(query: Any) -> str:
    """The plan of a query."""
    _prefer_indexes()
    return str(query.explain())


def explain_sql(sql: str) -> str:
    _prefer_indexes()
    with connection.cursor() as cursor:
        cursor.execute(f"{connection.ops.explain_query_prefix()} {sql}")
        return str(cursor.fetchall())


def _prefer_indexes() -> None:
    """The tables of a test are small enough for any plan to do; the question is what can be used."""
    if connection.vendor == "postgresql":
        with connection.cursor() as cursor:
            for plan in ("seqscan", "bitmapscan", "sort"):
                cursor.execute(f"SET LOCAL enable_{plan} = off")
