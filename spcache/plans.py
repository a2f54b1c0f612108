"""The plan cache: symbolic factors by canonical structure, and the systems of `spcache.solve`. Bounded and locked.

This is the only module-level mutable state of the package.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

__all__ = ["CacheInfo", "PlanCache", "plan_cache"]


class CacheInfo(NamedTuple):
    """State of the cache: entries and bytes held, lookups that found something, lookups that did not."""

    entries: int
    bytes: int
    hits: int
    misses: int


class PlanCache:
    """Least-recently-used cache, bounded in entries and bytes.

    Keys are compared exactly after hashing. Whatever is evicted lives on while somebody holds it.

    Attributes:
        max_entries, max_bytes: bounds; take effect at the next insertion.
    """

    def __init__(self, max_entries: int = 128, max_bytes: int = 2**30):
        self.max_entries = max_entries
        self.max_bytes = max_bytes
        self._entries: OrderedDict[Hashable, Any] = OrderedDict()
        self._hits = self._misses = 0
        self._renew_locks()

    def _renew_locks(self) -> None:
        """Also run in a forked child, where another thread's lock would stay taken forever."""
        self._lock = threading.Lock()
        self._building: dict[Hashable, threading.Lock] = {}

    def find(self, key: Hashable, build: Callable[[], Any]) -> tuple[Any, bool]:
        """The cached object of this key, built at most once at a time; and whether it was found."""
        with self._lock:
            entry = self._touch(key)
            if entry is not None:
                return entry, True
            building = self._building.setdefault(key, threading.Lock())
        with building:
            with self._lock:
                entry = self._touch(key)  # another thread may have built it meanwhile
                if entry is not None:
                    return entry, True
                self._misses += 1
            try:
                entry = build()
            except BaseException:
                with self._lock:
                    self._built(key, building)
                raise
            with self._lock:
                self._entries[key] = entry
                self._built(key, building)
                self._evict()
            return entry, False

    def _built(self, key: Hashable, building: threading.Lock) -> None:
        if self._building.get(key) is building:
            del self._building[key]

    def _touch(self, key: Hashable) -> Any:
        entry = self._entries.get(key)
        if entry is not None:
            self._hits += 1
            self._entries.move_to_end(key)
        return entry

    def _evict(self) -> None:
        """Drops the oldest entries until the bounds hold; the newest always stays."""
        while len(self._entries) > 1 and (
            len(self._entries) > self.max_entries or sum(e.nbytes for e in self._entries.values()) > self.max_bytes
        ):
            self._entries.popitem(last=False)

    def clear(self) -> None:
        """Forgets everything. Systems and factors in use keep what they have."""
        with self._lock:
            self._entries.clear()

    def trim(self) -> None:
        """Lets go of idle scratch memory and idle factor storage, and keeps the plans."""
        with self._lock:
            entries = list(self._entries.values())
        for entry in entries:
            entry.trim()

    def info(self) -> CacheInfo:
        """Entries, bytes, hits and misses."""
        with self._lock:
            nbytes = sum(e.nbytes for e in self._entries.values())
            return CacheInfo(len(self._entries), nbytes, self._hits, self._misses)

    def __len__(self) -> int:
        return len(self._entries)


plan_cache = PlanCache()
os.register_at_fork(after_in_child=plan_cache._renew_locks)
