"""The device lock is fair, and a thread that lends the device continues as if it had kept it."""

from __future__ import annotations

import threading
import time

import torch

from tinkerbell_server.engines.torch.device_lock import DeviceLock


def test_the_thread_that_has_waited_longest_is_next() -> None:
    device_lock, order = DeviceLock(), []

    def take(name: int) -> None:
        with device_lock.held():
            order.append(name)

    with device_lock.held():
        threads = []
        for name in range(4):
            threads.append(threading.Thread(target=take, args=(name,)))
            threads[-1].start()
            time.sleep(0.05)
    for thread in threads:
        thread.join()
    assert order == [0, 1, 2, 3]


def test_another_thread_can_compute_while_one_is_away_without_changing_its_random_numbers() -> None:
    device_lock, restored = DeviceLock(), []
    torch.manual_seed(1)
    expected = torch.rand(2)
    torch.manual_seed(1)

    def compute() -> None:
        with device_lock.held():
            torch.manual_seed(5)

    with device_lock.held():
        first = torch.rand(1)
        with device_lock.away(lambda: restored.append(True)):
            thread = threading.Thread(target=compute)
            thread.start()
            thread.join(10)
            assert not thread.is_alive()
        assert torch.equal(torch.cat([first, torch.rand(1)]), expected)
    assert restored == [True]
