"""Every check and every chore, each one session. `nox` runs lint, types, fast tests; `nox -t ci` all that CI runs."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import nox

# pip, not uv: a torch wheel from --find-links or an extra index is found by pip's own configuration
nox.options.default_venv_backend = "venv"
nox.options.reuse_existing_virtualenvs = True
nox.options.sessions = ["tests"]
nox.needs_version = ">=2025.5"

ROOT = Path(__file__).parent.resolve()
DIST = ROOT / "dist"
CONSTRAINTS = str(ROOT / ".ci" / "constraints.txt")
PLUGINS = sorted(path.parent for path in (ROOT / "plugins").glob("*/pyproject.toml"))
LINT_TOOLS = ["import-linter", "ruff"]
TEST_TOOLS = ["hatchling", "hypothesis", "pytest", "pytest-timeout", "pytest-xdist", "trustme"]
SDKS = ["0.25.0", "0.30.4", "0.36.0", "0.38.0"]
"""Versions of the Tinker SDK that are clients of this server; those before speak JSON, of which a test sends some."""
COOKBOOK = "tinker-cookbook==0.6.1"
COOKBOOK_NEEDS = [
    "aiohttp",
    "blobfile",
    "chz",
    "datasets",
    "math-verify",
    "pylatexenc",
    "pyrage",
    "sympy",
    "termcolor",
    "tiktoken",
]
"""What it declares, less tml-renderers, and what its arithmetic recipe asks for besides."""
OFFLINE = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def install(session: nox.Session, *packages: str) -> None:
    session.install("-c", CONSTRAINTS, "torch==2.13.0")
    session.install("-c", CONSTRAINTS, *packages)


def install_working_tree(session: nox.Session, *tools: str) -> None:
    install(session, "-e", ".[demo]", *tools)
    for plugin in PLUGINS:
        session.install("--no-deps", "-e", str(plugin))


def install_wheels(session: nox.Session, *tools: str) -> None:
    """Install the files that `build` made, so that no distribution of ours comes from an index."""
    core = next(DIST.glob("tinkerbell_core-*.whl"))
    plugins = [str(wheel) for wheel in sorted(DIST.glob("tinkerbell_loss_*.whl"))]
    install(session, f"tinkerbell-core[demo] @ {core.as_uri()}", *tools)
    session.install("--no-deps", "--force-reinstall", str(core), *plugins)


def check_style(session: nox.Session) -> None:
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")
    session.run("lint-imports")


def check_types(session: nox.Session) -> None:
    session.run("mypy")
    session.run("mypy", *(word for plugin in PLUGINS for word in ("-p", plugin.name.replace("-", "_"))))


@nox.session
def lint(session: nox.Session) -> None:
    """ruff, its formatter, and who may import whom."""
    session.install("-c", CONSTRAINTS, *LINT_TOOLS)
    check_style(session)


@nox.session
def types(session: nox.Session) -> None:
    """mypy, strict."""
    install_working_tree(session, "mypy", "types-protobuf", *TEST_TOOLS)
    check_types(session)


@nox.session(tags=["ci"])
def tests(session: nox.Session) -> None:
    """Lint, types, and every test but the slow ones: in one environment, since torch is large."""
    install_working_tree(session, "mypy", "types-protobuf", *LINT_TOOLS, *TEST_TOOLS)
    check_style(session)
    check_types(session)
    session.run("pytest", "-m", "not slow", "-n", "2", *session.posargs, env=OFFLINE)


@nox.session(tags=["ci"])
def sdk(session: nox.Session) -> None:
    """The stock Tinker SDK, each version this server promises in turn, and the openai client, against a real server."""
    install_working_tree(session, *TEST_TOOLS, "openai")
    for version in SDKS:
        session.install("-c", CONSTRAINTS, f"tinker=={version}")
        session.run("pytest", "tests/tinker", *session.posargs, env=OFFLINE)


@nox.session(name="sdk-latest")
def sdk_latest(session: nox.Session) -> None:
    """The newest Tinker SDK there is, for a weekly look."""
    install_working_tree(session, *TEST_TOOLS)
    session.install("--upgrade", "openai", "tinker")
    session.run("pytest", "tests/tinker", *session.posargs, env=OFFLINE)


@nox.session
def cookbook(session: nox.Session) -> None:
    """tinker-cookbook's own loops, unmodified, against a real server: each must end, and get better. Minutes."""
    install_working_tree(session, f"tinker=={SDKS[-1]}", *COOKBOOK_NEEDS)
    # it asks for tml-renderers 0.4.1; the newest found for Python 3.11 was 0.2.1, and these loops import none
    session.install("--no-deps", COOKBOOK)
    session.run("python", ".ci/cookbook.py", *session.posargs, env=OFFLINE)


@nox.session(tags=["ci"])
def slow(session: nox.Session) -> None:
    """The tests that train, and the demo."""
    install_working_tree(session, "mypy", *TEST_TOOLS)
    session.run("pytest", "-m", "slow", *session.posargs, env=OFFLINE)


@nox.session
def build(session: nox.Session) -> None:
    """Every distribution, by hatch, into dist/."""
    session.install("-c", CONSTRAINTS, "hatch")
    shutil.rmtree(DIST, ignore_errors=True)  # hatch's own --clean removes what it built before the last
    session.run("hatch", "build", "--all")


@nox.session(tags=["ci"], requires=["build"])
def wheel(session: nox.Session) -> None:
    """The built wheels, from outside the working tree: the command, and every example."""
    install_wheels(session, *TEST_TOOLS)
    session.chdir(session.create_tmp())
    session.run("tinkerbell", "plugin", "list")
    session.run("tinkerbell", "loss", "list", "--local")
    session.run("python", str(ROOT / ".ci" / "examples.py"), env=OFFLINE)


@nox.session(tags=["ci"], requires=["build"])
def plugins(session: nox.Session) -> None:
    """Every plugin's own tests, on the built wheels: one environment and one run, since torch is slow to import."""
    install_wheels(session, *TEST_TOOLS)
    folders = [str(plugin / "tests") for plugin in PLUGINS]
    session.run("pytest", "-n", "2", *folders, *session.posargs, env=OFFLINE)


@nox.session
def demo(session: nox.Session) -> None:
    """Train a tiny model from nothing, then with a loss of your own: about two minutes."""
    install(session, "-e", ".[demo]")
    session.run("tinkerbell", "demo", *session.posargs, env=OFFLINE)


@nox.session
def bench(session: nox.Session) -> None:
    """Every benchmark, in one table; `nox -s bench -- --json` for programs."""
    install_working_tree(session, f"tinker=={SDKS[-1]}")
    session.run("python", "benchmarks/_all.py", *session.posargs, env=OFFLINE)


@nox.session(venv_backend="none")
def gpu(session: nox.Session) -> None:
    """The engine's tests and the benchmarks on cuda, in the environment that runs nox (its torch knows the driver)."""
    env = {**OFFLINE, "TINKERBELL_TEST_DEVICE": "cuda"}
    session.run(sys.executable, "-m", "pytest", "tests/engine", *session.posargs, env=env)
    session.run(sys.executable, "benchmarks/_all.py", "--device", "cuda", env=env)
