"""The engine or the server ends and starts again: errors name the lost work, and no process is left running."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.fake_engine import FAKE_ENGINE
from tinkerbell_core.errors import TinkerbellError

ROWS = [[1, 2, 3], [4, 5]]


def test_a_killed_engine_restarts_with_its_models_at_their_last_saves(serve: Any) -> None:
    with serve() as caller:
        caller.train("kept", steps=2)
        saved = caller.done("/save", model_id="kept")
        caller.train("kept")
        caller.done("/create_model", model_id="whole")
        caller.kill_engine()
        assert caller.models()["kept"]["steps"] == 2
        problem = caller.problem("/forward_backward", model_id="kept", data=ROWS)
        assert (problem["status"], problem["kind"]) == (503, "EngineLost")
        assert "killed by signal 9" in problem["message"]
        assert f"back at step 2, its last save ({saved['path']}): 1 optim_step was lost" in problem["message"]
        caller.train("kept")
        assert caller.models()["kept"]["steps"] == 3
        caller.train("whole")


def test_the_error_after_a_kill_reports_a_lost_gradient(serve: Any) -> None:
    with serve() as caller:
        caller.done("/forward_backward", model_id="m", data=ROWS)
        caller.kill_engine()
        message = caller.problem("/optim_step", model_id="m")["message"]
        assert "never saved" in message
        assert "the gradient accumulated since was lost" in message
        assert caller.problem("/optim_step", model_id="m")["kind"] == "NothingAccumulated"


def test_requests_in_flight_fail_and_name_the_lost_steps(serve: Any) -> None:
    with serve() as caller:
        caller.train("slow-m")
        ids = [caller.accepted("/forward_backward", model_id="slow-m", data=ROWS) for _ in range(3)]
        caller.kill_engine()
        problems = [caller.future(request_id)["problem"] for request_id in ids]
        assert {problem["kind"] for problem in problems} == {"EngineLost"}
        assert "1 optim_step" in problems[0]["message"]
        caller.train("slow-m")


def test_a_loss_that_ends_the_engine_fails_and_other_models_can_be_trained(serve: Any) -> None:
    with serve() as caller:
        problem = caller.problem("/forward", model_id="crash-m", data=ROWS)
        assert "exited with status 9" in problem["message"]
        assert "crash-m" not in caller.models()
        caller.train("fine")


def test_a_device_failure_fails_its_call_and_the_engine_restarts(serve: Any) -> None:
    with serve() as caller:
        caller.train("other")
        caller.done("/save", model_id="other")
        problem = caller.problem("/forward_backward", model_id="assert-m", data=ROWS)
        assert problem["kind"] == "DeviceFailed"
        caller.until(lambda health: health["restarts"] == 1 and health["status"] == "ok")
        caller.done("/forward", model_id="other", data=ROWS)


def test_uploads_are_registered_again_after_a_restart_of_the_engine(serve: Any, make_upload: Any) -> None:
    with serve(uploads="trusted") as caller:
        body = msgspec.json.encode(make_upload())
        caller.http.post("/register_custom_loss", content=body, headers={"content-type": "application/json"})
        caller.kill_engine()
        assert caller.done("/forward", model_id="m", data=ROWS, loss_fn="mine")["loss_fn"] == "mine"
    with serve(uploads="off") as caller:
        assert "mine" not in caller.http.get("/list_loss_functions").json()["available_loss_functions"]


def test_a_restarted_server_has_its_models_at_their_last_saves(serve: Any) -> None:
    with serve() as caller:
        caller.train("m", steps=2)
        caller.done("/save", model_id="m")
        request = caller.accepted("/forward", model_id="m", data=ROWS)
        caller.future(request)
        caller.done("/create_model", model_id="unsaved")
        caller.train("unsaved")
    with serve() as caller:
        assert caller.future(request)["state"] == "done"
        assert caller.models()["m"]["steps"] == 2
        caller.train("m")
        problem = caller.problem("/create_model", model_id="unsaved")
        assert "the server was stopped" in problem["message"]
        caller.train("unsaved")
        assert caller.models()["unsaved"]["steps"] == 1


def test_requests_of_a_killed_server_are_reported_as_failed(serve: Any) -> None:
    with serve() as caller:
        ids = [caller.accepted("/forward", model_id="slow-m", data=ROWS) for _ in range(3)]
        engine = caller.engine_pid()
        caller.server.process.kill()
        caller.server.process.wait()
        wait_until_ended(engine)
    with serve() as caller:
        problem = caller.future(ids[-1])["problem"]
        assert problem["kind"] == "EngineLost"
        assert "the server was stopped" in problem["message"]


def test_the_error_after_a_kill_reports_a_save_that_was_removed(serve: Any) -> None:
    with serve() as caller:
        caller.train("m")
        path = Path(caller.done("/save", model_id="m")["path"])
        (path / "fake.json").unlink()
        caller.kill_engine()
        assert "could not be loaded" in caller.problem("/forward", model_id="m", data=ROWS)["message"]
        caller.train("m")


def test_a_model_of_another_base_can_only_be_deleted(serve: Any) -> None:
    with serve(model="one") as caller:
        caller.train("m")
    with serve(model="two") as caller:
        refused = caller.problem("/forward", model_id="m", data=ROWS)
        assert (refused["status"], refused["kind"]) == (409, "Conflict")
        assert "made on one" in refused["message"]
        caller.done("/delete_model", model_id="m")
        caller.train("m")


def test_a_second_server_on_the_data_dir_is_refused(serve: Any, capfd: pytest.CaptureFixture[str]) -> None:
    with serve() as first, pytest.raises(TinkerbellError, match="exited with status 1"), serve():
        pass
    assert f"another server (process {first.server.process.pid})" in capfd.readouterr().err


def test_the_server_exits_with_the_error_of_an_engine_that_cannot_start(
    serve: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(TinkerbellError), serve(model="refuses"):
        pass
    assert "error: there is no model in 'refuses'" in capfd.readouterr().err


WAITER = """
import sys, http.client, urllib.parse
connection = http.client.HTTPConnection(urllib.parse.urlsplit(sys.argv[1]).netloc)
connection.request("GET", sys.argv[2])
print("sent", flush=True)
connection.getresponse().read()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_all_processes_while_a_client_waits(serve: Any, number: signal.Signals) -> None:
    with serve() as caller:
        engine = caller.engine_pid()
        for _ in range(20):
            request_id = caller.accepted("/forward", model_id="slow-m", data=ROWS)
        command = [sys.executable, "-c", WAITER, str(caller.server), f"/futures/{request_id}?wait=30"]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as waiter:
            assert waiter.stdout is not None
            assert waiter.stdout.readline() == b"sent\n"
            time.sleep(0.2)
            began = time.monotonic()
            caller.server.process.send_signal(number)
            assert caller.server.process.wait(10) == 0
            assert time.monotonic() - began < 4
            wait_until_ended(engine)
            assert waiter.wait(10) == 0


def test_a_server_on_port_0_prints_its_url(tmp_path: Path) -> None:
    code = (
        "from tinkerbell_server.launch import run; from tinkerbell_server.config import Settings; import sys; "
        "sys.exit(run(Settings(engine='tests.fake_engine', port=0, data_dir=sys.argv[1])))"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 0
        process.stdout.close()
    assert "http://127.0.0.1:" in line


def test_the_error_for_a_port_in_use_suggests_another_port(tmp_path: Path) -> None:
    from tinkerbell_server.config import Settings
    from tinkerbell_server.launch import run

    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        with pytest.raises(TinkerbellError, match="pass another --port"):
            run(Settings(engine=FAKE_ENGINE, port=sock.getsockname()[1], data_dir=str(tmp_path)))


def test_a_service_stops_starting_an_engine_that_always_exits(tmp_path: Path) -> None:
    import asyncio

    from tinkerbell_server.access.tenants import Caller
    from tinkerbell_server.config import Settings
    from tinkerbell_server.service.service import Service

    async def start_and_wait() -> Service:
        service = Service(Settings(engine=FAKE_ENGINE, model="exits", data_dir=str(tmp_path)))
        service.start()
        try:
            assert not await service.bases.default.supervisor.settled()
            with pytest.raises(TinkerbellError, match="there is no engine"):
                await service.losses(Caller())
        finally:
            await service.stop()
        return service

    health = asyncio.run(start_and_wait()).health()
    assert health["status"] == "engine_down"
    assert "exited with status 3" in health["problem"]


@pytest.mark.parametrize(
    "module", ["tinkerbell_server.app", "tinkerbell_server.service.store", "tinkerbell_server.launch"]
)
def test_the_api_imports_no_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit(not sys.modules.keys().isdisjoint({{'torch', 'transformers', 'peft'}}))"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 0


def wait_until_ended(pid: int, seconds: float = 3) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        if Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z":
            return
        time.sleep(0.02)
    raise AssertionError(f"process {pid} has not ended")
