"""Attacks that read or write files, or read the memory of other processes."""

import os
from typing import Any

Targets = dict[str, Any]


def writes_a_file(targets: Targets, logits: Any) -> None:
    with open(os.path.join(targets["canary"], "written"), "w") as file:
        file.write("written")


def appends_to_a_file(targets: Targets, logits: Any) -> None:
    with open(targets["existing_file"], "a") as file:
        file.write("appended")


def truncates_a_file(targets: Targets, logits: Any) -> None:
    os.truncate(targets["existing_file"], 0)


def deletes_a_file(targets: Targets, logits: Any) -> None:
    os.unlink(targets["existing_file"])


def renames_a_file(targets: Targets, logits: Any) -> None:
    os.rename(targets["existing_file"], targets["existing_file"] + ".renamed")


def changes_a_mode(targets: Targets, logits: Any) -> None:
    os.chmod(targets["existing_file"], 0o777)


def creates_a_folder(targets: Targets, logits: Any) -> None:
    os.mkdir(os.path.join(targets["canary"], "folder"))


def creates_a_link(targets: Targets, logits: Any) -> None:
    os.symlink("/etc", os.path.join(targets["canary"], "link"))


def saves_a_tensor(targets: Targets, logits: Any) -> None:
    import torch

    torch.save(logits.detach(), os.path.join(targets["canary"], "logits.pt"))


def writes_to_shared_memory(targets: Targets, logits: Any) -> str:
    path = f"/dev/shm/{targets['name']}"
    with open(path, "w") as file:
        file.write("written")
    return path


def writes_to_tmp(targets: Targets, logits: Any) -> str:
    path = f"/tmp/{targets['name']}"
    with open(path, "w") as file:
        file.write("written")
    return path


def creates_a_temporary_file(targets: Targets, logits: Any) -> str:
    import tempfile

    return tempfile.NamedTemporaryFile(delete=False).name


def changes_installed_code(targets: Targets, logits: Any) -> str:
    import msgspec

    with open(msgspec.__file__, "a") as file:
        file.write("\n")
    return msgspec.__file__


def reads_a_secret(targets: Targets, logits: Any) -> str:
    with open(targets["secret_file"]) as file:
        return file.read()


def reads_the_servers_database(targets: Targets, logits: Any) -> str:
    found = []
    for folder, _, names in os.walk(targets["data"]):
        for name in names:
            with open(os.path.join(folder, name), "rb") as file:
                found.append(file.read().decode("latin-1"))
    return "".join(found)


def reads_the_environment(targets: Targets, logits: Any) -> str:
    return repr(dict(os.environ))


def reads_environments_in_proc(targets: Targets, logits: Any) -> str:
    found = []
    for pid in ["self", "1", str(os.getppid()), *[name for name in _listed("/proc") if name.isdigit()]]:
        try:
            with open(f"/proc/{pid}/environ") as file:
                found.append(file.read())
        except OSError:
            continue
    return " ".join(found)


def reads_the_memory_of_other_processes(targets: Targets, logits: Any) -> str:
    found = []
    for pid in [os.getppid(), *[int(name) for name in _listed("/proc") if name.isdigit()]]:
        try:
            with open(f"/proc/{pid}/maps") as maps, open(f"/proc/{pid}/mem", "rb") as memory:
                for line in maps:
                    if "[heap]" in line or "rw-p" in line:
                        start, end = (int(part, 16) for part in line.split()[0].split("-"))
                        memory.seek(start)
                        found += _around(targets, memory.read(min(end - start, 1 << 24)))
        except OSError:
            continue
    return " ".join(found)


def searches_for_objects_of_others(targets: Targets, logits: Any) -> str:
    import gc

    needles = (targets["marker_start"], targets["secret_start"])
    texts = [value for obj in gc.get_objects() if isinstance(obj, dict) for value in obj.values()]
    found = [text for text in texts if isinstance(text, str) and text.startswith(needles) and text not in needles]
    return repr(found) if found else ""


def lists_the_disk(targets: Targets, logits: Any) -> str:
    return " ".join(_listed(targets["canary"]) + _listed(targets["data"]) + _listed("/home") + _listed("/root"))


def opens_a_device(targets: Targets, logits: Any) -> str:
    names = ("mem", "kmsg", "sda", "vda", "kvm", "fuse", "nvidia0", "nvidiactl", "dri/card0")
    found = [name for name in names if _opens(f"/dev/{name}")]
    return " ".join(found)


def _listed(path: str) -> list[str]:
    try:
        return os.listdir(path)
    except OSError:
        return []


def _opens(path: str) -> bool:
    try:
        os.close(os.open(path, os.O_RDONLY))
    except OSError:
        return False
    return True


def _around(targets: Targets, data: bytes) -> list[str]:
    starts = (targets["marker_start"].encode(), targets["secret_start"].encode())
    return [data[data.find(start) :][:80].decode("latin-1") for start in starts if start in data]
