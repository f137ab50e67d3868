# Shared by .ci/run and .ci/nightly, which source it from the repository's root: a machine that has what the
# tests need, a private PostgreSQL, commands bounded in time, and an end that leaves nothing running.
set -euo pipefail
# Background jobs get a process group each, and do not ignore Ctrl-C.
set -m
# The database of the caller, and the variables of its make, are not for what is started here.
unset DATABASE_URL ARGS MAKEFLAGS MAKEOVERRIDES MFLAGS MAKELEVEL

say() { printf '\n==> %s\n' "$*"; }
as_postgres() { if [ "$(id -u)" = 0 ]; then runuser -u postgres -- "$@"; else "$@"; fi; }
find_initdb() { find /usr/lib/postgresql -path '*/bin/initdb' 2>/dev/null | sort -V | tail -n 1; }

# In the background, because bash runs no trap while a foreground command lasts; ended by an
# interrupt, because that is what makes pytest stop the servers that the tests have started.
bounded() {
  timeout -s INT -k 30 "$@" &
  wait $!
}

logs=$(mktemp -d)
tls_redis=$(mktemp -d)
cluster=
stop() {
  trap - EXIT
  for job in $(jobs -p); do kill -INT -- "-$job" 2>/dev/null || true; done
  wait
  if [ -n "$cluster" ]; then
    as_postgres timeout 30 "$bin/pg_ctl" -D "$cluster/data" -m immediate stop >/dev/null 2>&1 || true
    rm -rf "$cluster"
  fi
  rm -rf "$logs" "$tls_redis"
}
trap stop EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# Once for all of them: the index of packages is read once.
install() {
  if [ "$(id -u)" != 0 ]; then
    echo "Missing here: $*. Install it, or run this as root." >&2
    exit 1
  fi
  say "Installing $*"
  export DEBIAN_FRONTEND=noninteractive
  bounded 300 apt-get update -qq
  bounded 600 apt-get install -y -qq --no-install-recommends postgresql-common >/dev/null
  # The package would start a server of its own, and these scripts leave nothing running.
  sed -i 's/^#\?create_main_cluster.*/create_main_cluster = false/' /etc/postgresql-common/createcluster.conf
  bounded 600 apt-get install -y -qq --no-install-recommends "$@" >/dev/null
}

prepare_machine() {
  local missing=()
  command -v make >/dev/null || missing+=(make)
  command -v git >/dev/null || missing+=(git)
  python3 -c 'import ensurepip, venv' 2>/dev/null || missing+=(python3 python3-venv)
  # For the tests that look at the chat page; without it they would be skipped, but not where CI is set.
  command -v chromium >/dev/null || missing+=(chromium)
  [ -n "$(find_initdb)" ] || missing+=(postgresql)
  command -v redis-check-rdb >/dev/null || missing+=(redis-tools)
  [ ${#missing[@]} = 0 ] || install "${missing[@]}"
  # A Redis with TLS, for the test of that alone. Its package would start a service, and have all other tests
  # use another version than 6.2; that of the tools holds the same program under the name of one of them.
  ln -s "$(command -v redis-check-rdb)" "$tls_redis/redis-server"
  export TLS_REDIS_SERVER=$tls_redis/redis-server
  export CI=true
  say "Installing the requirements"
  bounded 900 make setup
}

# DATABASE_URL leads to it from here on.
start_postgresql() {
  bin=$(dirname "$(find_initdb)")
  say "Starting a private PostgreSQL from $bin"
  cluster=$(mktemp -d)
  if [ "$(id -u)" = 0 ]; then chown postgres "$cluster"; fi
  local port quick
  port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
  # Nothing here outlives the tests, so nothing needs to reach the disk.
  quick="-c fsync=off -c full_page_writes=off -c synchronous_commit=off"
  as_postgres timeout 120 "$bin/initdb" -D "$cluster/data" -U postgres -A trust -E UTF8 --locale C.UTF-8 -N >/dev/null
  as_postgres timeout 60 "$bin/pg_ctl" -D "$cluster/data" -l "$cluster/log" -w start >/dev/null \
    -o "-p $port -k $cluster -c listen_addresses=127.0.0.1 -c max_connections=200 $quick" ||
    { cat "$cluster/log" >&2; exit 1; }
  export DATABASE_URL=postgres://postgres@127.0.0.1:$port/postgres
}
