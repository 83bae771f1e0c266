"""Attacks that start, signal or trace processes, or that request privileges from the kernel."""

import ctypes
import os
import signal
from typing import Any

Targets = dict[str, Any]


def forks(targets: Targets, logits: Any) -> str:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    return f"a child, {pid}"


def runs_a_program(targets: Targets, logits: Any) -> str:
    import subprocess

    subprocess.run(["/usr/bin/touch", os.path.join(targets["canary"], "touched")], check=True)
    return "ran"


def runs_a_shell(targets: Targets, logits: Any) -> str | None:
    status = os.system(f"touch {targets['canary']}/touched")
    return None if status else "ran"


def replaces_itself_by_a_program(targets: Targets, logits: Any) -> None:
    os.execv("/usr/bin/touch", ["touch", os.path.join(targets["canary"], "touched")])


def kills_its_parent(targets: Targets, logits: Any) -> str:
    os.kill(os.getppid(), signal.SIGKILL)
    return "killed"


def kills_all_processes(targets: Targets, logits: Any) -> str:
    os.kill(-1, signal.SIGKILL)
    return "killed"


def kills_its_parent_by_pidfd(targets: Targets, logits: Any) -> str:
    handle = os.pidfd_open(os.getppid())
    signal.pidfd_send_signal(handle, signal.SIGKILL)
    return "killed"


def traces_its_parent(targets: Targets, logits: Any) -> str | None:
    return _if_successful("ptrace", ctypes.CDLL(None).ptrace(16, os.getppid(), 0, 0))


def leaves_its_namespaces(targets: Targets, logits: Any) -> str | None:
    return _if_successful("unshare", ctypes.CDLL(None).unshare(0x10000000))


def mounts(targets: Targets, logits: Any) -> str | None:
    return _if_successful("mount", ctypes.CDLL(None).mount(b"none", b"/tmp", b"tmpfs", 0, None))


def becomes_root(targets: Targets, logits: Any) -> str | None:
    return _if_successful("setuid", ctypes.CDLL(None).setresuid(0, 0, 0))


def makes_rare_system_calls(targets: Targets, logits: Any) -> str | None:
    """io_uring_setup, bpf, userfaultfd, keyctl, perf_event_open, open_by_handle_at, memfd_create, kexec_load."""
    libc, buffer = ctypes.CDLL(None), ctypes.create_string_buffer(256)
    numbers = (425, 321, 323, 250, 298, 304, 319, 246)
    worked = [number for number in numbers if libc.syscall(number, 0, buffer, 0, 0, 0) >= 0]
    return f"system calls {worked}" if worked else None


def raises_its_limits(targets: Targets, logits: Any) -> str:
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return "no limit"


def compiles_an_extension(targets: Targets, logits: Any) -> str:
    from torch.utils.cpp_extension import load_inline

    load_inline("hostile", "int one() { return 1; }", functions=["one"], build_directory=targets["canary"])
    return "compiled"


def _if_successful(name: str, result: int) -> str | None:
    return name if result >= 0 else None
