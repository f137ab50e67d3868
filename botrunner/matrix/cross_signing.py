"""Cross-sign the bot's own device, which nio cannot do. Without a cross-signature some clients neither
share keys with a device nor show its messages as safe.

The private keys are in the store beside the device's, so the bot stays verified when it gets a new
device.
"""

import json
import logging
import os
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from nio.api import Api
from unpaddedbase64 import decode_base64, encode_base64

from botrunner.matrix.client import API, Homeserver
from botrunner.matrix.errors import MatrixError, TokenRefused
from botrunner.matrix.seeds import read, write

logger = logging.getLogger(__name__)

USAGES = ("master", "self_signing", "user_signing")


class Identity:
    """The three cross-signing keys of the account."""

    def __init__(self, user_id: str, seeds: dict[str, bytes]) -> None:
        self.user_id = user_id
        self._keys = {usage: Ed25519PrivateKey.from_private_bytes(seeds[usage]) for usage in USAGES}

    @classmethod
    def stored(cls, store: Path, user_id: str) -> "Identity":
        """Load the identity from the store, or create it. Raises `lib.secrets.Unreadable`."""
        seeds = read(store, user_id)
        if seeds is None:
            seeds = {usage: encode_base64(os.urandom(32)) for usage in USAGES}
            write(store, user_id, seeds)
        return cls(user_id, {usage: decode_base64(seeds[usage]) for usage in USAGES})

    def public(self, usage: str) -> str:
        return str(encode_base64(self._keys[usage].public_key().public_bytes_raw()))

    def public_keys(self) -> dict[str, Any]:
        """Return the body of /keys/device_signing/upload."""
        keys = {}
        for usage in USAGES:
            key = self.public(usage)
            keys[f"{usage}_key"] = {
                "user_id": self.user_id,
                "usage": [usage],
                "keys": {f"ed25519:{key}": key},
            }
        for usage in ("self_signing", "user_signing"):
            self.sign(keys[f"{usage}_key"], "master")
        return keys

    def sign(self, body: dict[str, Any], usage: str) -> None:
        """Add a signature by one of the keys."""
        message = {k: v for k, v in body.items() if k not in ("signatures", "unsigned")}
        signature = self._keys[usage].sign(Api.to_canonical_json(message).encode())
        signatures = body.setdefault("signatures", {}).setdefault(self.user_id, {})
        signatures[f"ed25519:{self.public(usage)}"] = encode_base64(signature)


async def sign_own_device(homeserver: Homeserver, password: str) -> None:
    """Publish the account's keys and sign the device, unless done. If the homeserver refuses, the bot
    works without a signature. Raises `TokenRefused`."""
    try:
        if await _sign(homeserver, password):
            logger.info("Cross-signed device %s", homeserver.device_id)
    except TokenRefused:
        raise
    except MatrixError as error:
        logger.warning("Device %s is not cross-signed: %s", homeserver.device_id, error)


async def _sign(homeserver: Homeserver, password: str) -> bool:
    me, device_id = homeserver.user_id, homeserver.device_id
    identity = Identity.stored(homeserver.store, me)
    known = await homeserver.request("POST", f"{API}/keys/query", {"device_keys": {me: []}})
    device = known.get("device_keys", {}).get(me, {}).get(device_id)
    if not isinstance(device, dict):
        raise MatrixError("NO_DEVICE_KEYS", "The homeserver does not have the device's keys.")
    is_published = _has_key(known, "self_signing_keys", me, identity.public("self_signing"))
    signer = f"ed25519:{identity.public('self_signing')}"
    if is_published and signer in device.get("signatures", {}).get(me, {}):
        return False
    if not is_published:
        await _publish(homeserver, identity, password)
    device.pop("unsigned", None)
    identity.sign(device, "self_signing")
    master = identity.public_keys()["master_key"]
    if homeserver.nio.olm:
        signature = homeserver.nio.olm.sign_json(master)
        master["signatures"] = {me: {f"ed25519:{device_id}": signature}}
    body = {me: {device_id: device, identity.public("master"): master}}
    answer = await homeserver.request("POST", f"{API}/keys/signatures/upload", body)
    if failures := answer.get("failures"):
        raise MatrixError("SIGNATURES_REFUSED", json.dumps(failures))
    return True


async def _publish(homeserver: Homeserver, identity: Identity, password: str) -> None:
    """Publish the keys; to replace existing ones, the homeserver asks for the password."""
    path = f"{API}/keys/device_signing/upload"
    keys = identity.public_keys()
    try:
        await homeserver.request("POST", path, keys)
    except MatrixError as error:
        if error.status != 401 or not error.session:
            raise
        proof = {
            "type": "m.login.password",
            "identifier": {"type": "m.id.user", "user": identity.user_id},
            "password": password,
            "session": error.session,
        }
        await homeserver.request("POST", path, {**keys, "auth": proof})


def _has_key(known: dict[str, Any], kind: str, user_id: str, key: str) -> bool:
    return key in known.get(kind, {}).get(user_id, {}).get("keys", {}).values()
