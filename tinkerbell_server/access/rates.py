"""How often something may happen, by name, in a sliding minute."""

from __future__ import annotations

import time

from pyrate_limiter import Duration, InMemoryBucket, Rate, RateItem

_MOST_NAMES = 4096


class Rates:
    """limit: times a minute for each name; 0 for no limit."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._buckets: dict[str, InMemoryBucket] = {}

    def take(self, name: str) -> float:
        """0 where `name` may go, else the seconds until it may."""
        if self._limit == 0:
            return 0.0
        now = time.monotonic_ns() // 1_000_000
        if name not in self._buckets:
            self._forget(now)
            self._buckets[name] = InMemoryBucket([Rate(self._limit, Duration.MINUTE)])
        bucket = self._buckets[name]
        bucket.leak(now)
        item = RateItem(name, now)
        if bucket.put(item):
            return 0.0
        wait = bucket.waiting(item)
        assert isinstance(wait, int)  # this kind of bucket does not answer later
        return max(wait, 1) / 1000

    def _forget(self, now: int) -> None:
        """Drop names that nothing happened to lately, once there are many."""
        if len(self._buckets) < _MOST_NAMES:
            return
        for bucket in self._buckets.values():
            bucket.leak(now)
        self._buckets = {name: bucket for name, bucket in self._buckets.items() if bucket.count() > 0}
