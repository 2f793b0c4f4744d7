"""What the kernel may believe of a file's size.

It cannot be known exactly from what it is told. It throws the attributes of a reply away if, since it made the request,
it was told to drop what it knows of the inode, or took in another reply, or wrote to the file itself
(`fuse_change_attributes`, attr_version), and also while a write that makes the file longer, or a truncation, is under
way (FUSE_I_SIZE_UNSTABLE). So there are bounds: what may have been thrown away makes them wider.
"""

from __future__ import annotations

NEVER_TOLD = 1 << 63
"""More than any size."""


class KernelSize:
    __slots__ = ("least", "most")

    def __init__(self) -> None:
        self.least = NEVER_TOLD
        self.most = 0

    def told(self, size: int) -> None:
        """A reply with attributes leaves."""
        self.least = min(self.least, size)
        self.most = max(self.most, size)

    def reaches(self, end: int) -> None:
        """It wrote so far, or was shown a byte there: it believes in this size at least."""
        self.least = end if self.least == NEVER_TOLD else max(self.least, end)
        self.most = max(self.most, end)

    def ended(self, end: int) -> None:
        """A READ ended there: if it had believed in more, it may take that for the end (fuse_short_read)."""
        self.least = min(self.least, end)

    def believes(self, size: int) -> None:
        """This is certain."""
        self.least = self.most = size
