"""The changes that one sync brings."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class RoomUpdate:
    room_id: str
    # In timeline order, decrypted if possible.
    events: list[dict[str, Any]]
    is_encrypted: bool
    # Sent before the bot was invited: never handled, but recorded for the console.
    earlier: list[dict[str, Any]] = field(default_factory=list)
    # No event is missing before these: a member without a join among them joined earlier.
    is_complete: bool = True


@dataclass(frozen=True)
class Invitation:
    room_id: str
    inviter: str


@dataclass
class Batch:
    next_batch: str
    joined: list[RoomUpdate] = field(default_factory=list)
    invitations: list[Invitation] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    # Rooms in which a join or a leave may have been missed.
    members_lost: set[str] = field(default_factory=set)
    # By room: the members and the ids of their membership events.
    members: dict[str, dict[str, str]] = field(default_factory=dict)
    # The state of the key store that has seen this batch.
    key_writes: int = 0

    @property
    def is_empty(self) -> bool:
        return not (self.joined or self.invitations or self.left or self.members)
