"""What a mount counts of its caches and of the bytes that pass through it. Core: no I/O."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class Hits:
    """Questions to one cache: answered from it, or not."""

    hits: int = 0
    misses: int = 0

    def count(self, hit: bool) -> None:
        if hit:
            self.hits += 1
        else:
            self.misses += 1

    def as_json(self) -> dict[str, int]:
        return {"hits": self.hits, "misses": self.misses}


@dataclass(slots=True)
class Counters:
    """Of one mount, since it was made. What the kernel answers from its own caches never reaches us."""

    attributes: Hits = field(default_factory=Hits)
    """A vnode was needed: it had a promise, or its status was fetched."""
    names: Hits = field(default_factory=Hits)
    """A name was looked up in a directory."""
    listings: Hits = field(default_factory=Hits)
    """A directory was listed."""
    pages: Hits = field(default_factory=Hits)
    """A READ: all its bytes were there, or it had to wait for some to be fetched."""
    kernel_attributes: Hits = field(default_factory=Hits)
    """Attributes given to the kernel that it may keep, or (misses) has to ask for again."""
    kernel_names: Hits = field(default_factory=Hits)
    """The same for names."""
    read_bytes: int = 0
    """That the kernel read here, in answer to applications or ahead of them."""
    written_bytes: int = 0
    fetched_bytes: int = 0
    """From servers."""
    stored_bytes: int = 0
    """To servers, appended ones among them."""

    def caches_as_json(self) -> dict[str, dict[str, int]]:
        return {
            name: getattr(self, name).as_json()
            for name in ("attributes", "names", "listings", "pages", "kernel_attributes", "kernel_names")
        }
