"""Whatever stands in an Authorization header: it proves who somebody is, or it is said not to."""

import time
from typing import Any

import jwt
import pytest
from hypothesis import strategies as st
from rest_framework.test import APIClient

from realm import openid, tokens
from tests.fuzz.examples import anything, numbers, objects, tried, words
from tests.fuzz.test_model_answers import dumps

SEED = "tests-only-realm-seed-0123456789-0123456789-0123456789"
NOW = int(time.time())
TIMES = st.one_of(numbers, st.integers(NOW - 100, NOW + 10**6))
CLAIMS = objects(
    {"user": st.one_of(words, st.just("@alice:localhost")), "exp": TIMES, "iat": TIMES},
    nbf=TIMES,
    sessionRoom=words,
    aud=words,
    iss=words,
    sub=words,
    jti=words,
)
HEADERS = objects(
    {"alg": st.sampled_from(["HS256", "none", "HS512", "RS256", "hs256"])},
    kid=words,
    crit=anything,
    b64=anything,
    jku=words,
    typ=words,
    zip=words,
)


def signed(claims: Any, headers: Any) -> str:
    """With the right key, which only a server of ours has: what it says may be odd nevertheless."""
    algorithm = jwt.api_jws.PyJWS().get_algorithm_by_name("HS256")
    encode = jwt.utils.base64url_encode
    if isinstance(headers, dict) and not headers:
        headers = {"alg": "HS256"}
    message = b".".join(encode(dumps(part)) for part in (headers, claims))
    key = algorithm.prepare_key(SEED)
    return b".".join([message, encode(algorithm.sign(message, key))]).decode()


def checked(token: str) -> None:
    try:
        claims = tokens.verify(token)
    except tokens.InvalidToken as error:
        assert str(error)
        return
    assert claims.user.startswith("@")
    assert NOW - 60 < claims.expires < time.time() + tokens.MAX_AGE_SECONDS + 60


@tried(100, claims=st.one_of(CLAIMS, anything), headers=st.one_of(st.just({}), HEADERS))
def test_tokens_of_our_own_hand(claims: Any, headers: Any) -> None:
    checked(signed(claims, headers))


@tried(
    100,
    token=st.one_of(words, st.lists(st.text("abeyJ-_=", max_size=9), max_size=4).map(".".join)),
)
def test_tokens_of_anybodys(token: str) -> None:
    checked(token)


@pytest.mark.django_db
@tried(25, header=st.text(st.characters(min_codepoint=1, max_codepoint=255), max_size=40))
def test_headers(header: str) -> None:
    client = APIClient(raise_request_exception=False)
    for start in ("", "Bearer ", "bearer\t"):
        for path in ("/api/chat/models", "/_bot-registrations"):
            answer = client.get(path, HTTP_AUTHORIZATION=start + header)
            assert answer.status_code in (200, 401)


@tried(
    100,
    status=st.sampled_from([200, 201, 301, 401, 403, 404, 429, 500, 503]),
    body=st.one_of(objects({"sub": words}).map(dumps), anything.map(dumps), st.binary(max_size=40)),
)
def test_what_a_homeserver_says_of_an_openid_token(status: int, body: bytes) -> None:
    try:
        assert openid._subject(status, body).startswith("@")
    except openid.OpenIDError as error:
        assert str(error)
