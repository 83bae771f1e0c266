"""`pytest --tinkerbell-losses`: the conformance kit as tests, one a loss and check, for every loss installed here.

pytest loads this wherever tinkerbell-core is installed, so it imports nothing that is large until it is asked to.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tinkerbell_core.spec import LossSpec
    from tinkerbell_core.testing import CheckResult, Sandboxed


class Hooks:
    """What other plugins may bring."""

    @pytest.hookspec(firstresult=True)
    def pytest_tinkerbell_sandbox(self, config: pytest.Config) -> Sandboxed | None:
        """What runs a loss in a sandbox, for the last check of the kit; asked once a session, where that is run."""


def pytest_addhooks(pluginmanager: pytest.PytestPluginManager) -> None:
    pluginmanager.add_hookspecs(Hooks)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--tinkerbell-losses",
        nargs="?",
        const="",
        default=None,
        metavar="NAMES",
        help="run the conformance kit on every installed loss, or on those of these names or distributions (comma)",
    )


def pytest_collection_modifyitems(session: pytest.Session, config: pytest.Config, items: list[pytest.Item]) -> None:
    """Add the kit to what was collected."""
    wanted = config.getoption("--tinkerbell-losses")
    if wanted is not None:
        items += _collected(session, {name.strip() for name in wanted.split(",") if name.strip()})


@pytest.fixture(scope="session")
def tinkerbell_losses() -> list[LossSpec]:
    """Every loss installed here."""
    return list(_installed())


@pytest.fixture(scope="session")
def tinkerbell_sandbox(pytestconfig: pytest.Config) -> Sandboxed | None:
    """To pass on: `check_loss(spec, sandboxed=tinkerbell_sandbox)`. None where tinkerbell-core[server] is missing."""
    return _sandbox(pytestconfig)


class LossItem(pytest.Item):
    """One check of one loss; the kit is run once a loss."""

    def __init__(self, *, spec: LossSpec, check: str, results: dict[str, list[CheckResult]], **kwargs: Any) -> None:
        super().__init__(**kwargs)  # Any: as pytest calls it
        self._spec, self._check, self._results = spec, check, results

    def runtest(self) -> None:
        from tinkerbell_core.testing import run_checks

        if self._spec.id not in self._results:
            self._results[self._spec.id] = run_checks(self._spec, sandboxed=_sandbox(self.config))
        found = {result.name: result for result in self._results[self._spec.id]}
        result = found.get(self._check)
        if result is None:
            pytest.skip("it does not keep the contract, so nothing else was checked")
        if not result.ran:
            pytest.skip(f"not run: {result.message}")
        if not result.ok:
            raise AssertionError(result.message)

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> str:
        """The message alone: the traceback would be the kit's."""
        return f"{self._spec.id}, {self._check}: {excinfo.value}"

    def reportinfo(self) -> tuple[str, None, str]:
        return self.nodeid.partition("::")[0], None, self.name


_SANDBOX = pytest.StashKey["Sandboxed | None"]()


def _sandbox(config: pytest.Config) -> Sandboxed | None:
    """The one of this session."""
    if _SANDBOX not in config.stash:
        config.stash[_SANDBOX] = config.hook.pytest_tinkerbell_sandbox(config=config)
    return config.stash[_SANDBOX]


def _collected(session: pytest.Session, wanted: set[str]) -> Iterator[LossItem]:
    from tinkerbell_core.testing import CHECKS
    from tinkerbell_core.testing.checks import CONTRACT

    results: dict[str, list[CheckResult]] = {}
    here = list(_installed())
    known = {name for spec in here for name in (spec.name, spec.id, spec.provenance.distribution or "")}
    if unknown := wanted - known:
        raise pytest.UsageError(f"--tinkerbell-losses: no loss or distribution {sorted(unknown)[0]!r} is installed")
    for spec in here:
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
