"""Records which functions of the project a process calls between two signals.

`tools.trace_call` puts a copy of this file, named `sitecustomize.py`, on the PYTHONPATH of the server that it starts,
so every Python process of that server imports it first. SIGUSR1 starts a recording; SIGUSR2 ends it and writes it to
`<pid>.json` in the folder TRACE_FOLDER. `<pid>.ready` and `<pid>.recording` show that the process can be signalled
and that it records.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
from pathlib import Path
from types import FrameType

Event = tuple[int, str, str, str, str]
"""The id of the thread, "call" or "return", the file of the function, its qualified name, and the file of its caller.

Files are relative to the root; the caller's is "" if the caller is not a function of the project."""


class Recorder:
    """Records the calls and returns of functions in `packages`, on every thread, while `active`."""

    def __init__(self, root: str, packages: list[str], folder: Path) -> None:
        self._root = root.rstrip(os.sep) + os.sep
        self._prefixes = tuple(self._root + package + os.sep for package in packages)
        self._folder = folder
        self._events: list[Event] = []
        self.active = False

    def install(self) -> None:
        """Listen for the two signals, and profile each thread that starts later; call this in the main thread."""
        signal.signal(signal.SIGUSR1, self._start)
        signal.signal(signal.SIGUSR2, self._stop)
        threading.setprofile(self._profile)
        with contextlib.suppress(OSError):  # a sandboxed process cannot write here, and is not recorded
            self._write("ready", " ".join(sys.orig_argv))

    def _profile(self, frame: FrameType, event: str, argument: object) -> None:
        if not self.active or (event != "call" and event != "return"):
            return
        file = frame.f_code.co_filename
        if file.startswith(self._prefixes):
            caller = frame.f_back.f_code.co_filename if frame.f_back is not None else ""
            function = frame.f_code.co_qualname
            self._events.append((threading.get_ident(), event, self._short(file), function, self._short(caller)))

    def _short(self, file: str) -> str:
        return file.removeprefix(self._root) if file.startswith(self._prefixes) else ""

    def _start(self, number: int, frame: FrameType | None) -> None:
        self._events = []
        self.active = True
        # signal handlers run in the main thread, which is not profiled before: it would import torch at half the speed
        sys.setprofile(self._profile)
        self._write("recording", "")

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.active = False
        sys.setprofile(None)
        (self._folder / f"{os.getpid()}.recording").unlink(missing_ok=True)
        self._write("json", json.dumps({"command": sys.orig_argv, "events": self._events}))

    def _write(self, suffix: str, text: str) -> None:
        """Write a file of this process in one rename, so that a reader never sees a part of it."""
        draft = self._folder / f"{os.getpid()}.draft"
        draft.write_text(text)
        draft.replace(self._folder / f"{os.getpid()}.{suffix}")


if "TRACE_FOLDER" in os.environ:
    Recorder(os.environ["TRACE_ROOT"], os.environ["TRACE_PACKAGES"].split(), Path(os.environ["TRACE_FOLDER"])).install()
