"""Reading what is not theirs, and leaving something behind."""

import os
from typing import Any

Where = dict[str, Any]


def writes_a_file(where: Where, logits: Any) -> None:
    with open(os.path.join(where["canary"], "written"), "w") as file:
        file.write("here")


def appends_to_a_file(where: Where, logits: Any) -> None:
    with open(where["kept"], "a") as file:
        file.write("and here")


def truncates_a_file(where: Where, logits: Any) -> None:
    os.truncate(where["kept"], 0)


def deletes_a_file(where: Where, logits: Any) -> None:
    os.unlink(where["kept"])


def renames_a_file(where: Where, logits: Any) -> None:
    os.rename(where["kept"], where["kept"] + ".gone")


def changes_a_mode(where: Where, logits: Any) -> None:
    os.chmod(where["kept"], 0o777)


def makes_a_folder(where: Where, logits: Any) -> None:
    os.mkdir(os.path.join(where["canary"], "folder"))


def makes_a_link(where: Where, logits: Any) -> None:
    os.symlink("/etc", os.path.join(where["canary"], "link"))


def saves_a_tensor(where: Where, logits: Any) -> None:
    import torch

    torch.save(logits.detach(), os.path.join(where["canary"], "logits.pt"))


def writes_to_shared_memory(where: Where, logits: Any) -> str:
    path = f"/dev/shm/{where['name']}"
    with open(path, "w") as file:
        file.write("here")
    return path


def writes_to_tmp(where: Where, logits: Any) -> str:
    path = f"/tmp/{where['name']}"
    with open(path, "w") as file:
        file.write("here")
    return path


def makes_a_temporary_file(where: Where, logits: Any) -> str:
    import tempfile

    return tempfile.NamedTemporaryFile(delete=False).name


def changes_installed_code(where: Where, logits: Any) -> str:
    import msgspec

    with open(msgspec.__file__, "a") as file:
        file.write("\n")
    return msgspec.__file__


def reads_a_secret(where: Where, logits: Any) -> str:
    with open(where["secret_file"]) as file:
        return file.read()


def reads_the_servers_database(where: Where, logits: Any) -> str:
    found = []
    for folder, _, names in os.walk(where["data"]):
        for name in names:
            with open(os.path.join(folder, name), "rb") as file:
                found.append(file.read().decode("latin-1"))
    return "".join(found)


def reads_the_environment(where: Where, logits: Any) -> str:
    return repr(dict(os.environ))


def reads_environments_in_proc(where: Where, logits: Any) -> str:
    found = []
    for pid in ["self", "1", str(os.getppid()), *[name for name in _listed("/proc") if name.isdigit()]]:
        try:
            with open(f"/proc/{pid}/environ") as file:
                found.append(file.read())
        except OSError:
            continue
    return " ".join(found)


def reads_the_memory_of_others(where: Where, logits: Any) -> str:
    found = []
    for pid in [os.getppid(), *[int(name) for name in _listed("/proc") if name.isdigit()]]:
        try:
            with open(f"/proc/{pid}/maps") as maps, open(f"/proc/{pid}/mem", "rb") as memory:
                for line in maps:
                    if "[heap]" in line or "rw-p" in line:
                        start, end = (int(part, 16) for part in line.split()[0].split("-"))
                        memory.seek(start)
                        found += _around(where, memory.read(min(end - start, 1 << 24)))
        except OSError:
            continue
    return " ".join(found)


def looks_for_objects_of_others(where: Where, logits: Any) -> str:
    import gc

    needles = (where["marker_start"], where["secret_start"])
    texts = [item for thing in gc.get_objects() if isinstance(thing, dict) for item in thing.values()]
    found = [text for text in texts if isinstance(text, str) and text.startswith(needles) and text not in needles]
    return repr(found) if found else ""


def lists_the_disk(where: Where, logits: Any) -> str:
    return " ".join(_listed(where["canary"]) + _listed(where["data"]) + _listed("/home") + _listed("/root"))


def opens_a_device(where: Where, logits: Any) -> str:
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


def _around(where: Where, data: bytes) -> list[str]:
    starts = (where["marker_start"].encode(), where["secret_start"].encode())
    return [data[data.find(start) :][:80].decode("latin-1") for start in starts if start in data]
