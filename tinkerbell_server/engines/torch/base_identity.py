"""Identifies a base model by its content: a digest of its config and of its weights.

Two names of one folder have one identity, and two models of equal shape have different identities. The digest covers

- config.json, without the keys that change when the same model is saved again;
- the name, dtype and shape of every tensor, from the headers of the safetensors files;
- three blocks of the bytes of every tensor. Two fine-tunes of one model have equal headers and differ here. They would
  collide only if they agree in all of these blocks, which are about a megabyte for a model of 300 tensors.

A tensor is read by name, so a model that was saved again in other shards keeps its identity. Files of another format
(pytorch_model.bin) are read as bytes: their sizes and evenly spaced blocks count. The weights are never read as a
whole: 290 tensors take 7 ms in a folder of 500 MB, and as long in a larger one.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from transformers.utils.hub import cached_file

log = logging.getLogger("tinkerbell.engine")

BLOCK = 1024
"""Bytes of one block."""

BLOCKS = 64
"""Blocks of a file that is not safetensors."""

_VOLATILE = frozenset({"_name_or_path", "_commit_hash", "transformers_version", "torch_dtype", "dtype", "use_cache"})
"""Keys of config.json, at any depth, that do not change the function that a model computes in a given dtype."""

# the order in which transformers looks for them
_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


def base_identity(source: str, revision: str | None) -> str:
    """The identity of a base model, a local folder or a hub id; empty if its files cannot be read."""
    try:
        return folder_identity(folder_of(source, revision))
    except (OSError, ValueError, LookupError) as error:
        log.warning("the base model %r has no identity, so only its name is compared: %s", source, error)
        return ""


def folder_identity(folder: Path) -> str:
    """The identity of the model in a folder: 64 hexadecimal digits.

    Raises OSError, ValueError or LookupError if a file is missing or broken.
    """
    digest = hashlib.sha256(b"tinkerbell base 1\n")
    config = json.loads((folder / "config.json").read_bytes())
    digest.update(json.dumps(_stable(config), sort_keys=True, separators=(",", ":")).encode())
    files = weights_files(folder)
    tensors = [tensor for file in files if file.suffix == ".safetensors" for tensor in _tensors(file)]
    for name, described, content in sorted(tensors):
        digest.update(f"\n{name} {described} {content}".encode())
    for file in files:
        if file.suffix != ".safetensors":
            digest.update(f"\n{file.name} {file.stat().st_size} {_blocks_of_file(file)}".encode())
    return digest.hexdigest()


def commit_of(model: Any, revision: str | None) -> str | None:
    """The commit of a model that came from the hub, else the requested revision. Any: a transformers model."""
    return getattr(model.config, "_commit_hash", None) or revision


def folder_of(source: str, revision: str | None) -> Path:
    """The folder that holds the files of a base: the local folder itself, or the snapshot of the hub's cache.

    Raises OSError if the model has not been downloaded.
    """
    if os.path.isdir(source):
        return Path(source)
    config = cached_file(source, "config.json", revision=revision, local_files_only=True)
    if config is None:
        raise OSError(f"config.json of {source!r} is not in the cache of the hub")
    return Path(config).parent


def weights_files(folder: Path) -> list[Path]:
    """The files that transformers reads the weights from, by name; empty if the folder has none of them."""
    found = next((folder / name for name in _WEIGHTS if (folder / name).exists()), None)
    if found is None:
        return []
    if found.suffix != ".json":
        return [found]
    return [folder / name for name in sorted(set(json.loads(found.read_bytes())["weight_map"].values()))]


def _stable(value: Any) -> Any:
    """A JSON value without the volatile keys. Any: JSON."""
    if isinstance(value, dict):
        return {key: _stable(item) for key, item in value.items() if key not in _VOLATILE}
    return [_stable(item) for item in value] if isinstance(value, list) else value


def _tensors(file: Path) -> Iterator[tuple[str, str, str]]:
    """Of each tensor in a safetensors file: its name, its dtype with its shape, and a digest of three blocks."""
    size = file.stat().st_size
    with file.open("rb", buffering=0) as opened:
        prefix = opened.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
        if length > size - 8:
            raise ValueError(f"{file} is not a safetensors file, or it is incomplete")
        header = json.loads(os.pread(opened.fileno(), length, 8))
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            start, end = entry["data_offsets"]
            places = _places(end - start, 3)
            content = _digest(os.pread(opened.fileno(), size, 8 + length + start + at) for at, size in places)
            yield name, f"{entry['dtype']} {entry['shape']}", content


def _blocks_of_file(file: Path) -> str:
    with file.open("rb", buffering=0) as opened:
        places = _places(file.stat().st_size, BLOCKS)
        return _digest(os.pread(opened.fileno(), size, at) for at, size in places)


def _places(size: int, blocks: int) -> list[tuple[int, int]]:
    """Offset and length of evenly spaced blocks of `size` bytes, the first and the last included; all if they fit."""
    if size <= blocks * BLOCK:
        return [(0, size)]
    return [((size - BLOCK) * index // (blocks - 1), BLOCK) for index in range(blocks)]


def _digest(blocks: Iterable[bytes]) -> str:
    return hashlib.sha256(b"".join(blocks)).hexdigest()
