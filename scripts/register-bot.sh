#!/usr/bin/env bash
# Register a bot for the user of a realm-server JWT, and print the registration.
#
#   REALM_SERVER_URL   by default that of the running local stack, or http://localhost:4201
#   REALM_SERVER_JWT   required; `python manage.py realm_token @user:server` prints one
#   USERNAME           default @user:localhost; the Matrix id of the token's user
set -euo pipefail

fail() {
  printf 'register-bot: %s\n' "$*" >&2
  exit 1
}

stack="$(cd "$(dirname "$0")/.." && pwd)/.local"
port="$(sed -n 's/^REALM_SERVER_PORT=//p' "${STACK_DIR:-$stack}/stack.env" 2>/dev/null || true)"
url="${REALM_SERVER_URL:-http://localhost:${REALM_SERVER_PORT:-${port:-4201}}}"
url="${url%/}/_bot-registration"
username="${USERNAME:-@user:localhost}"
jwt="${REALM_SERVER_JWT:-}"

[[ -n "$jwt" ]] || fail 'REALM_SERVER_JWT is required: the realm-server JWT of the user.'
[[ "$jwt" =~ ^[A-Za-z0-9._-]+$ ]] || fail 'REALM_SERVER_JWT is not a JWT.'
[[ "$username" != *[[:cntrl:]]* ]] || fail 'USERNAME is not a Matrix user id.'
command -v curl >/dev/null || fail 'curl is needed.'

escaped="${username//\\/\\\\}"
escaped="${escaped//\"/\\\"}"
body="{\"data\":{\"type\":\"bot-registration\",\"attributes\":{\"username\":\"$escaped\"}}}"

# The token is passed as configuration, because other users can read the command line.
if ! answer="$(
  printf 'header = "Authorization: Bearer %s"\n' "$jwt" |
    curl --config - --silent --show-error --connect-timeout 5 --max-time 30 \
      --header 'Content-Type: application/vnd.api+json' \
      --header 'Accept: application/vnd.api+json' \
      --data-binary "$body" --write-out '\n%{http_code}' "$url" 2>&1
)"; then
  problem="${answer#*curl: }"
  fail "$url cannot be reached: ${problem%%$'\n'*}"
fi

status="${answer##*$'\n'}"
document="${answer%$'\n'*}"
if [[ "$status" != 201 ]]; then
  detail="$document"
  if [[ "$document" =~ \"detail\":\ *\"(([^\"\\]|\\.)*)\" ]]; then
    detail="${BASH_REMATCH[1]//\\\"/\"}"
  elif [[ "$document" != \{* ]]; then
    detail='this does not look like a realm server.'
  fi
  fail "$url answered $status: $detail"
fi
printf '%s\n' "$document"
