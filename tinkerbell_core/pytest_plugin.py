"""Adds `pytest --tinkerbell-losses`: the conformance kit as tests, one per loss and check, for the installed losses.

pytest loads this module in every project that has tinkerbell-core installed, so it imports torch only if needed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tinkerbell_core.spec import LossSpec
    from tinkerbell_core.testing import CheckResult, Sandboxed


class Hooks:
    """Hooks that other pytest plugins may implement."""

    @pytest.hookspec(firstresult=True)
    def pytest_tinkerbell_sandbox(self, config: pytest.Config) -> Sandboxed | None:
        """Return a function that runs a loss in a sandbox. Called once per session, if the sandbox check runs."""


def pytest_addhooks(pluginmanager: pytest.PytestPluginManager) -> None:
    pluginmanager.add_hookspecs(Hooks)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--tinkerbell-losses",
        nargs="?",
        const="",
        default=None,
        metavar="NAMES",
        help="run the conformance kit on all installed losses, or on a comma-separated list of names or distributions",
    )


def pytest_collection_modifyitems(session: pytest.Session, config: pytest.Config, items: list[pytest.Item]) -> None:
    """Add the checks of the kit to the collected tests."""
    names = config.getoption("--tinkerbell-losses")
    if names is not None:
        items += _collected(session, {name.strip() for name in names.split(",") if name.strip()})


@pytest.fixture(scope="session")
def tinkerbell_losses() -> list[LossSpec]:
    """Every installed loss."""
    return list(_installed())


@pytest.fixture(scope="session")
def tinkerbell_sandbox(pytestconfig: pytest.Config) -> Sandboxed | None:
    """For `check_loss(spec, sandboxed=tinkerbell_sandbox)`. None if tinkerbell-core[server] is not installed."""
    return _sandbox(pytestconfig)


class LossItem(pytest.Item):
    """One check of one loss. All checks of a loss run together, when its first item runs."""

    def __init__(self, *, spec: LossSpec, check: str, results: dict[str, list[CheckResult]], **kwargs: Any) -> None:
        super().__init__(**kwargs)  # Any: the arguments of pytest.Item
        self._spec, self._check, self._results = spec, check, results

    def runtest(self) -> None:
        from tinkerbell_core.testing import run_checks

        if self._spec.id not in self._results:
            self._results[self._spec.id] = run_checks(self._spec, sandboxed=_sandbox(self.config))
        found = {result.name: result for result in self._results[self._spec.id]}
        result = found.get(self._check)
        if result is None:
            pytest.skip("not checked, because the loss does not keep the contract")
        if not result.ran:
            pytest.skip(f"not run: {result.message}")
        if not result.ok:
            raise AssertionError(result.message)

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> str:
        """The message alone, because the traceback shows only the code of the kit."""
        return f"{self._spec.id}, {self._check}: {excinfo.value}"

    def reportinfo(self) -> tuple[str, None, str]:
        return self.nodeid.partition("::")[0], None, self.name


_SANDBOX = pytest.StashKey["Sandboxed | None"]()


def _sandbox(config: pytest.Config) -> Sandboxed | None:
    """The sandbox of this session, created at the first call."""
    if _SANDBOX not in config.stash:
        config.stash[_SANDBOX] = config.hook.pytest_tinkerbell_sandbox(config=config)
    return config.stash[_SANDBOX]


def _collected(session: pytest.Session, wanted: set[str]) -> Iterator[LossItem]:
    from tinkerbell_core.testing import CHECKS
    from tinkerbell_core.testing.checks import CONTRACT

    results: dict[str, list[CheckResult]] = {}
    installed = list(_installed())
    known = {name for spec in installed for name in (spec.name, spec.id, spec.provenance.distribution or "")}
    if unknown := wanted - known:
        raise pytest.UsageError(f"--tinkerbell-losses: no loss or distribution {sorted(unknown)[0]!r} is installed")
    for spec in installed:
        if wanted and not wanted & {spec.name, spec.id, spec.provenance.distribution}:
            continue
        for check in (CONTRACT, *CHECKS):
            item = LossItem.from_parent(session, name=f"{spec.id}[{check}]", spec=spec, check=check, results=results)
            yield item


def _installed() -> Iterator[LossSpec]:
    from tinkerbell_core.registry import build_registry

    registry, plugins = build_registry()
    for plugin in plugins:
        if plugin.error:
            raise pytest.UsageError(f"plugin {plugin.id} is broken: {plugin.error}")
    yield from registry
