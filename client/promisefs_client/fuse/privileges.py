"""Set-user-ID and set-group-ID go when a process without privileges changes a file's bytes.

The kernel sees to that, by the mode that it knows. Of an open file it may not know that another mount has set them
since: nothing in a write makes it ask. So we do it as well, by who opened the file.
"""

from __future__ import annotations

import stat


def mode_without_privileges(mode: int) -> int | None:
    """What the mode of a regular file becomes by a write; None if that is what it is.

    Set-group-ID stays where the group may not execute: there it means something else.
    """
    kept = mode & ~stat.S_ISUID
    if mode & stat.S_IXGRP:
        kept &= ~stat.S_ISGID
    return None if kept == mode else kept


def keeps_privileges(uid: int) -> bool:
    """Whether what a user writes leaves them alone. (CAP_FSETID decides, which we are not told of.)"""
    return uid == 0
