# Sourced by .ci/run and .ci/nightly in the repository's root: install what the tests need, start a private
# PostgreSQL, bound commands in time, and leave nothing running.
set -euo pipefail
# Background jobs get a process group each, and do not ignore Ctrl-C.
set -m
# The tests start without the caller's database and without the variables of its make.
unset DATABASE_URL ARGS MAKEFLAGS MAKEOVERRIDES MFLAGS MAKELEVEL

step() { printf '\n==> %s\n' "$*"; }
as_postgres() { if [ "$(id -u)" = 0 ]; then runuser -u postgres -- "$@"; else "$@"; fi; }
find_initdb() { find /usr/lib/postgresql -path '*/bin/initdb' 2>/dev/null | sort -V | tail -n 1; }

# In the background, because bash runs no trap during a foreground command; ended by an interrupt, on
# which pytest stops the servers that the tests have started.
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

# All at once: the index of packages is read once.
install() {
  if [ "$(id -u)" != 0 ]; then
    echo "Missing here: $*. Install it, or run this as root." >&2
    exit 1
  fi
  step "Installing $*"
  export DEBIAN_FRONTEND=noninteractive
  bounded 300 apt-get update -qq
  bounded 600 apt-get install -y -qq --no-install-recommends postgresql-common >/dev/null
  # The package would start a server of its own.
  sed -i 's/^#\?create_main_cluster.*/create_main_cluster = false/' /etc/postgresql-common/createcluster.conf
  bounded 600 apt-get install -y -qq --no-install-recommends "$@" >/dev/null
}

prepare_machine() {
  local missing=()
  command -v make >/dev/null || missing+=(make)
  command -v git >/dev/null || missing+=(git)
  python3 -c 'import ensurepip, venv' 2>/dev/null || missing+=(python3 python3-venv)
  # For the tests of the chat page, which are skipped without it, but fail where CI is set.
  command -v chromium >/dev/null || missing+=(chromium)
  [ -n "$(find_initdb)" ] || missing+=(postgresql)
  command -v redis-check-rdb >/dev/null || missing+=(redis-tools)
  # For their tests, which are skipped without them. Their services may start: no test uses ports 80 and 6432.
  command -v pgbouncer >/dev/null || [ -x /usr/sbin/pgbouncer ] || missing+=(pgbouncer)
  command -v nginx >/dev/null || [ -x /usr/sbin/nginx ] || missing+=(nginx-light)
  [ ${#missing[@]} = 0 ] || install "${missing[@]}"
  # A Redis with TLS, for its own test. The package redis-server would start a service, and all other tests
  # would use its version instead of 6.2; redis-tools has the same program under another name.
  ln -s "$(command -v redis-check-rdb)" "$tls_redis/redis-server"
  export TLS_REDIS_SERVER=$tls_redis/redis-server
  export CI=true
  step "Installing the requirements"
  bounded 900 make setup
}

# Sets postgresql, the URL of the server.
start_postgresql() {
  bin=$(dirname "$(find_initdb)")
  step "Starting a private PostgreSQL from $bin"
  cluster=$(mktemp -d)
  if [ "$(id -u)" = 0 ]; then chown postgres "$cluster"; fi
  local port quick
  port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
  # The data is dropped after the tests, so nothing needs to reach the disk.
  quick="-c fsync=off -c full_page_writes=off -c synchronous_commit=off"
  as_postgres timeout 120 "$bin/initdb" -D "$cluster/data" -U postgres -A trust -E UTF8 --locale C.UTF-8 -N >/dev/null
  as_postgres timeout 60 "$bin/pg_ctl" -D "$cluster/data" -l "$cluster/log" -w start >/dev/null \
    -o "-p $port -k $cluster -c listen_addresses=127.0.0.1 -c max_connections=200 $quick" ||
    { cat "$cluster/log" >&2; exit 1; }
  postgresql=postgres://postgres@127.0.0.1:$port/postgres
}
