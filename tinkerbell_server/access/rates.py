"""Limits how often an event may happen for each name in a sliding minute."""

from __future__ import annotations

import time

from pyrate_limiter import Duration, InMemoryBucket, Rate, RateItem

_MOST_NAMES = 4096


class Rates:
    """limit: events of one name in a minute; 0: no limit."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._buckets: dict[str, InMemoryBucket] = {}

    def take(self, name: str) -> float:
        """Count an event of `name`. Returns 0 if it is allowed, otherwise the seconds until the next one is."""
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
        assert isinstance(wait, int)  # a bucket in memory never returns an awaitable
        return max(wait, 1) / 1000

    def _forget(self, now: int) -> None:
        """Remove names without recent events if there are many names."""
        if len(self._buckets) < _MOST_NAMES:
            return
        for bucket in self._buckets.values():
            bucket.leak(now)
        self._buckets = {name: bucket for name, bucket in self._buckets.items() if bucket.count() > 0}
