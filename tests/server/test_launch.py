"""A server starts as a program and as a child process, and one that cannot start gives the reason."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import ssl
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
import trustme

from tests.fake_engine import FAKE_ENGINE
from tests.live import live_server
from tinkerbell_core.errors import BadRequest, TinkerbellError
from tinkerbell_server.config import Settings
from tinkerbell_server.launch import listen, run, running_server


def test_a_response_in_two_parts_is_not_delayed_by_nagles_algorithm() -> None:
    async def nodelay_of_a_connection() -> int:
        options: asyncio.Queue[int] = asyncio.Queue()

        async def answer(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            sock = writer.get_extra_info("socket")
            options.put_nowait(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        async with await asyncio.start_server(answer, sock=listen(Settings(port=0))) as server:
            _reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
            value = await options.get()
            writer.close()
            return value

    assert asyncio.run(nodelay_of_a_connection())


def test_the_command_line_starts_a_server_with_tls(tmp_path: Path) -> None:
    authority, certificate = trustme.CA(), tmp_path / "chain.pem"
    authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(certificate)
    command = [sys.executable, "-m", "tinkerbell_server", "--engine", FAKE_ENGINE, "--port", "0"]
    command += ["--data-dir", str(tmp_path / "data"), "--ssl-certfile", str(certificate)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TINKERBELL_")}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        url = next(word for word in line.split() if word.startswith("https://")).rstrip(";")
        trusted = ssl.create_default_context()
        authority.configure_trust(trusted)
        with httpx.Client(verify=trusted, trust_env=False) as http:
            assert http.get(f"{url}/healthz").json()["status"] in ("starting", "ok")
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
        process.stdout.close()


def test_a_certificate_that_cannot_be_read_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "c.pem").write_text("nothing")
    for path in (tmp_path / "c.pem", tmp_path / "missing.pem"):
        with pytest.raises(BadRequest, match=rf"TLS: {path} .* cannot be used"):
            run(Settings(engine=FAKE_ENGINE, port=0, data_dir=str(tmp_path / "data"), ssl_certfile=str(path)))


def test_a_child_process_that_does_not_start_is_an_error_with_the_end_of_its_log(tmp_path: Path) -> None:
    settings = Settings(engine=FAKE_ENGINE, model="refuses", data_dir=str(tmp_path / "data"))
    with (
        pytest.raises(TinkerbellError, match=r"(?s)exited with status 1 .* no model in 'refuses'"),
        running_server(settings, log=tmp_path / "log", timeout=30),
    ):
        raise AssertionError("the block must not be entered")


def test_a_child_process_is_ended_with_its_block(tmp_path: Path) -> None:
    settings = Settings(engine=FAKE_ENGINE, data_dir=str(tmp_path / "data"))
    with running_server(settings, log=tmp_path / "log", timeout=30) as server:
        assert httpx.get(f"{server}/healthz", trust_env=False).json()["status"] == "ok"
    assert server.process.returncode == 0


def test_a_child_process_ends_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from tinkerbell_server.config import Settings; "
        "from tinkerbell_server.launch import running_server\n"
        "settings = Settings(engine='tests.fake_engine', data_dir=sys.argv[1])\n"
        "with running_server(settings, log=Path(sys.argv[2])) as server:\n"
        "    print(server.process.pid, flush=True)\n"
        "    time.sleep(60)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "data"), str(tmp_path / "log")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        parent.kill()
    deadline = time.monotonic() + 30
    while _is_running(child):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_server_for_tests_does_not_import_from_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", "")
    monkeypatch.chdir(tmp_path)
    with live_server(tmp_path, engine=FAKE_ENGINE, uploads="off") as url:
        assert httpx.get(f"{url}/healthz", trust_env=False).json()["status"] == "ok"
        environ = Path(f"/proc/{_pid_with(str(tmp_path / 'data'))}/environ").read_bytes().split(b"\0")
    [python_path] = [entry for entry in environ if entry.startswith(b"PYTHONPATH=")]
    assert b"" not in python_path.removeprefix(b"PYTHONPATH=").split(b":")


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def _pid_with(word: str) -> int:
    """The process with this word in its command line."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        if word.encode() in path.read_bytes():
            return int(path.parent.name)
    raise LookupError(word)
