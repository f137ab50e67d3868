from tests.realm.conftest import alice, bob, charlie, homeserver, nobody

__all__ = ["alice", "bob", "charlie", "homeserver", "nobody"]
