"""A real server in a child process, for tests that are its clients."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


@contextmanager
def live_server(folder: Path, *, seconds: float = 120, **settings: Any) -> Iterator[str]:
    """The address of a ready server with these settings; its data and its log are in `folder`."""
    # here, because the session `client` imports this module without the dependencies of the server
    from tinkerbell_server.config import Settings
    from tinkerbell_server.launch import running_server

    # the server must import the code under test and tests.fake_engine, whatever the current folder is. An empty entry
    # of PYTHONPATH would be the current folder
    paths = [str(ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    with running_server(
        Settings(data_dir=str(folder / "data"), **settings),
        log=folder / "server.log",
        timeout=seconds,
        environment={"PYTHONPATH": os.pathsep.join(paths)},
    ) as server:
        yield server.url
