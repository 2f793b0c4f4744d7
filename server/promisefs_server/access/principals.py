"""Users and groups as people write them in access control lists."""

from __future__ import annotations

from promisefs_protocol.abort import AbortCode, Aborted
from promisefs_protocol.principals import ADMINISTRATORS, ANONYMOUS, ANYUSER, AUTHUSER

_BUILT_IN = {
    "system:administrators": ADMINISTRATORS,
    "system:anyuser": ANYUSER,
    "system:authuser": AUTHUSER,
    "anonymous": ANONYMOUS,
}


class Principals:
    """Who there is."""

    def id_of(self, name: str) -> int:
        """Abort NOENT."""
        found = _BUILT_IN.get(name)
        if found is None:
            raise Aborted(AbortCode.NOENT, f"there is no user or group {name!r}")
        return found

    def name_of(self, who: int) -> str:
        """The name, or the number of who is there no more."""
        return next((name for name, number in _BUILT_IN.items() if number == who), str(who))
