"""What a caller may do with a vnode, and the checks of the operations. docs/access.md has the table.

Whoever lacks a right gets EACCES, and that says nothing about what is there: the check comes before anything is looked
up. Rights come from the list of a directory; what a list gives somebody is worked out once and kept by the numbers of
the two, so a check costs microseconds. Whoever's groups change is another Identity.
"""

from __future__ import annotations

from promisefs_protocol.abort import AbortCode, Aborted
from promisefs_protocol.rights import LOOKUP, READ, SUPERUSER, WRITE, Rights, may_read, may_write

from promisefs_server.identity.identity import Identity
from promisefs_server.store.acls import Acls
from promisefs_server.store.vnodes import Vnode, VnodeTable

from .acl import rights_on_directory, rights_on_file

MAX_KEPT = 100_000
"""Most pairs of a list and an identity that are kept; then they are worked out anew."""


class AccessControl:
    def __init__(self, acls: Acls, vnodes: VnodeTable) -> None:
        self._acls = acls
        self._vnodes = vnodes
        self._given: dict[tuple[int, Identity], int] = {}
        self._to_anyone: dict[int, int] = {}

    # What a caller has

    def rights(self, identity: Identity, vnode: Vnode) -> int:
        """`Rights`, with SUPERUSER and OWNER."""
        given = self._list_gives(identity, self._list_of(vnode))
        if vnode.is_dir:
            return rights_on_directory(identity, given, vnode.uid, vnode.parent == vnode.key)
        return rights_on_file(identity, given, vnode.uid)

    def rights_of_anyone(self, vnode: Vnode) -> int:
        """What everybody has, with or without a token."""
        number = self._list_of(vnode)
        given = self._to_anyone.get(number)
        if given is None:
            if len(self._to_anyone) >= MAX_KEPT:
                self._to_anyone.clear()
            given = self._to_anyone[number] = int(self._acls.get(number).rights_of_anyone)
        return given

    def _list_of(self, vnode: Vnode) -> int:
        if vnode.is_dir or not vnode.nlink:  # an orphan's directory may be gone
            return vnode.acl
        return self._acls.of_directory(vnode.parent)

    def _list_gives(self, identity: Identity, number: int) -> int:
        key = (number, identity)
        given = self._given.get(key)
        if given is None:
            if len(self._given) >= MAX_KEPT:
                self._given.clear()
            given = self._given[key] = int(self._acls.get(number).rights_of(identity))
        return given

    def has(self, identity: Identity, directory: Vnode, needed: Rights) -> bool:
        return not needed & ~self.rights(identity, directory)

    # Checks. Each aborts ACCES.

    def need(self, identity: Identity, directory: Vnode, needed: Rights) -> None:
        """All of these rights on a directory."""
        if not self.has(identity, directory, needed):
            raise _refused(directory)

    def need_any(self, identity: Identity, directory: Vnode, enough: Rights) -> None:
        """One of these rights on a directory."""
        if not self.rights(identity, directory) & enough:
            raise _refused(directory)

    def need_status(self, identity: Identity, vnode: Vnode) -> None:
        """Looking at a vnode: with `l` where its name is; of a directory also with `l` on it."""
        rights = self.rights(identity, vnode)
        if vnode.is_dir:
            if not rights & LOOKUP and not self._may_look_into_parent(identity, vnode):
                raise _refused(vnode)
        elif not rights & (LOOKUP | READ):
            raise _refused(vnode)

    def _may_look_into_parent(self, identity: Identity, directory: Vnode) -> bool:
        if directory.parent == directory.key:
            return False
        return bool(self._list_gives(identity, self._acls.of_directory(directory.parent)) & LOOKUP)

    def need_read(self, identity: Identity, vnode: Vnode) -> None:
        """The bytes of a file, the target of a symlink, extended attributes."""
        rights = self.rights(identity, vnode)
        if not (may_read(rights, vnode.mode) if vnode.is_file else rights & LOOKUP):
            raise _refused(vnode)

    def need_write(self, identity: Identity, vnode: Vnode) -> None:
        """The bytes of a file."""
        if not may_write(self.rights(identity, vnode), vnode.mode):
            raise _refused(vnode)

    def need_change(self, identity: Identity, vnode: Vnode) -> None:
        """Mode, times, extended attributes: mode bits do not matter."""
        if not self.rights(identity, vnode) & (WRITE | SUPERUSER):
            raise _refused(vnode)

    def need_lock(self, identity: Identity, vnode: Vnode, *, exclusive: bool) -> None:
        enough = WRITE if exclusive else WRITE | int(Rights.LOCK)
        if not self.rights(identity, vnode) & (enough | SUPERUSER):
            raise _refused(vnode)

    def need_link(self, identity: Identity, vnode: Vnode, directory: Vnode) -> None:
        """Another name for a file: elsewhere only if it might be moved there, for it may come to use that list."""
        self.need(identity, directory, Rights.INSERT)
        rights = self.rights(identity, vnode)
        if not rights & (LOOKUP | READ) or (vnode.parent != directory.key and not rights & Rights.DELETE):
            raise _refused(vnode)


def _refused(vnode: Vnode) -> Aborted:
    return Aborted(AbortCode.ACCES, f"no rights for this on {vnode.fid}")
