# One image for all processes; the command selects one. compose.yaml has all of them.

FROM python:3.11-slim-bookworm AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
WORKDIR /app
# Before the code, which changes more often.
COPY requirements/base.txt requirements/prod.txt requirements/
RUN pip install -r requirements/prod.txt && pip uninstall --yes pip setuptools
COPY . .
# The build has no secrets and no database, and needs none.
RUN DEBUG=true DATABASE_URL=sqlite://:memory: python manage.py collectstatic --no-input \
    && python -m compileall -q .

FROM python:3.11-slim-bookworm
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 DEBUG=false LOG_FORMAT=json WEB_CONCURRENCY=2
# db holds the keys of encrypted rooms, and the SQLite file unless DATABASE_URL is set.
RUN useradd --uid 10001 --no-create-home --shell /usr/sbin/nologin botrealm \
    && install -d -o botrealm -g botrealm /app/db /app/db/botrunner
COPY --from=build /opt/venv /opt/venv
COPY --from=build /app /app
WORKDIR /app
USER 10001
VOLUME /app/db
EXPOSE 3000
# Of the web server, without the database: an unavailable database is no reason to kill it.
HEALTHCHECK --interval=10s --timeout=5s --start-period=20s \
    CMD ["python", "-c", "import http.client as h; c = h.HTTPConnection('127.0.0.1', 3000, timeout=4); c.request('GET', '/healthz'); raise SystemExit(c.getresponse().status != 200)"]
# Requests that wait for a result finish: a little more than CHAT_MAX_WAIT_SECONDS.
CMD ["uvicorn", "config.asgi:application", "--http", "config.server.protocol:BoundedProtocol", "--host", "0.0.0.0", "--port", "3000", "--lifespan", "off", "--ws", "none", "--no-access-log", "--no-proxy-headers", "--no-server-header", "--timeout-graceful-shutdown", "70", "--timeout-worker-healthcheck", "30", "--log-level", "warning"]
