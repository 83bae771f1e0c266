"""The call tracer counts the files that a request passes through."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from tools import recorder
from tools.trace_call import Recording

PROGRAM = """
import threading
from package.a import through_b
thread = threading.Thread(target=through_b)
print("imported", flush=True)
input()
thread.start()
thread.join()
through_b()
print("called", flush=True)
input()
"""


def wait_for(file: Path) -> None:
    deadline = time.monotonic() + 20
    while not file.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_move_is_a_call_in_another_file_than_the_previous_call_of_the_thread() -> None:
    events: list[recorder.Event] = [
        (1, "call", "a.py", "f", ""),
        (1, "call", "b.py", "g", "a.py"),
        (2, "call", "c.py", "h", ""),
        (1, "return", "b.py", "g", "a.py"),
        (1, "call", "b.py", "g", "a.py"),
        (1, "return", "b.py", "g", "a.py"),
        (1, "return", "a.py", "f", ""),
    ]
    recording = Recording("process", events)
    assert recording.calls == {"a.py": 1, "b.py": 2, "c.py": 1}
    assert recording.moves() == [("", "a.py"), ("a.py", "b.py"), ("", "c.py")]
    assert recording.moves(returns=True) == [*recording.moves(), ("b.py", "a.py")]


def test_the_recorder_records_calls_of_the_packages_on_every_thread(tmp_path: Path) -> None:
    package, recordings = tmp_path / "package", tmp_path / "recordings"
    package.mkdir()
    recordings.mkdir()
    (package / "a.py").write_text("from package.b import leaf\ndef through_b():\n    leaf()\n")
    (package / "b.py").write_text("import posixpath\ndef leaf():\n    posixpath.join('a', 'b')\n")
    shutil.copy(recorder.__file__, tmp_path / "sitecustomize.py")
    variables = {"TRACE_FOLDER": str(recordings), "TRACE_ROOT": str(tmp_path), "TRACE_PACKAGES": "package"}
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        env={**os.environ, "PYTHONPATH": str(tmp_path), **variables},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "imported\n"
        for number, suffix in ((signal.SIGUSR1, "recording"), (signal.SIGUSR2, "json")):
            process.send_signal(number)
            wait_for(recordings / f"{process.pid}.{suffix}")
            process.stdin.write("\n")
            process.stdin.flush()
            assert process.stdout.readline() == ("called\n" if suffix == "recording" else "")
    events = json.loads((recordings / f"{process.pid}.json").read_text())["events"]
    calls = [(file, function) for _, event, file, function, _ in events if event == "call"]
    assert calls == [("package/a.py", "through_b"), ("package/b.py", "leaf")] * 2
    assert len({thread for thread, *_ in events}) == 2
