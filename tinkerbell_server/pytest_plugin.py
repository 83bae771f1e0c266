"""Lets the conformance kit in pytest run losses in the sandbox of uploads.

pytest loads this plugin in every environment with tinkerbell-core, so it imports large modules only when the sandbox is
used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tinkerbell_core.testing import Sandboxed


# optional: the core's plugin, which defines the hook, may be disabled
@pytest.hookimpl(optionalhook=True)
def pytest_tinkerbell_sandbox(config: pytest.Config) -> Sandboxed | None:
    """The sandbox; None if the dependencies of the [server] extra are not installed."""
    try:
        from tinkerbell_server.sandbox.conformance import ConformanceSandbox
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("tinkerbell"):
            raise
        return None
    sandbox = ConformanceSandbox()
    config.add_cleanup(sandbox.close)
    return sandbox
