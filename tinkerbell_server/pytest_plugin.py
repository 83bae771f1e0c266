"""Gives the conformance kit in pytest the sandbox that uploads run in.

pytest loads this wherever tinkerbell-core is installed, so it imports nothing that is large until it is asked to.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tinkerbell_core.testing import Sandboxed


# optional: the hook is of the core's plugin, which may be switched off
@pytest.hookimpl(optionalhook=True)
def pytest_tinkerbell_sandbox(config: pytest.Config) -> Sandboxed | None:
    """None where the server's dependencies are missing, which is what `tinkerbell-core` without [server] is."""
    try:
        from tinkerbell_server.sandbox.conformance import KitSandbox
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("tinkerbell"):
            raise
        return None
    made = KitSandbox()
    config.add_cleanup(made.close)
    return made
