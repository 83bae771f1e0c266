"""Loads losses of this machine by name: installed losses, a package's folder, a file, or `module:function`."""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
import tomllib
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from tinkerbell_core.decorator import loss
from tinkerbell_core.errors import BadLoss, UnknownLoss, did_you_mean
from tinkerbell_core.plugins import GROUP
from tinkerbell_core.registry import DOTTED, build_registry, is_dotted
from tinkerbell_core.spec import LossSpec


def find_specs(target: str) -> list[LossSpec]:
    """The losses that `target` names, at least one. Raises UnknownLoss, AmbiguousLoss or BadLoss."""
    path = Path(target)
    if path.is_dir():
        return _in_package(path)
    if path.suffix == ".py" and path.is_file():
        return _in_file(path)
    if path.suffix == ".py" or len(path.parts) > 1:
        raise UnknownLoss(f"there is no file or folder {target!r}")
    registry, infos = build_registry()
    broken = [info for info in infos if info.error and target in (info.id, info.distribution, info.name)]
    if broken:
        raise BadLoss(f"plugin {broken[0].id!r} is broken: {broken[0].error}")
    packaged = [spec for spec in registry if spec.provenance.distribution == target]
    if packaged:
        return packaged
    if is_dotted(target) and target not in registry:
        return [import_loss(target)]
    return [registry.get(target)]


def import_loss(path: str) -> LossSpec:
    """Import the loss that `my.module:function` names. Raises UnknownLoss, or BadLoss with the traceback."""
    match = DOTTED.fullmatch(path)
    if match is None:
        raise UnknownLoss(f"{path!r} is not a dotted path: write my.module:function")
    module = _import(match[1])
    value = getattr(module, match[2], None)
    if value is None:
        functions = [name for name, attribute in vars(module).items() if callable(attribute)]
        raise UnknownLoss(f"the module {match[1]!r} has no {match[2]!r}{did_you_mean(match[2], functions)}")
    if isinstance(value, LossSpec):
        return value
    if not callable(value) or isinstance(value, type):
        raise BadLoss(f"{path!r} is a {type(value).__name__}, not a loss: name a function, decorated with @loss or not")
    return loss(value)


def _import(module: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name and (module == error.name or module.startswith(f"{error.name}.")):
            raise UnknownLoss(f"there is no module {module!r}: install it, or set PYTHONPATH") from None
        raise BadLoss(f"importing {module!r} failed: {error}", traceback.format_exc()) from error
    # broad: the module is a plugin, which can raise anything at import, SystemExit included
    except (Exception, SystemExit) as error:
        raise BadLoss(
            f"importing {module!r} failed: {type(error).__name__}: {error}", traceback.format_exc()
        ) from error


def _in_package(folder: Path) -> list[LossSpec]:
    """The losses of the entry points in a folder's pyproject.toml; the package need not be installed."""
    try:
        project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
        modules = dict(project["entry-points"][GROUP])
    except (FileNotFoundError, KeyError):
        raise UnknownLoss(
            f"{folder} is not a loss package: its pyproject.toml needs [project.entry-points.{GROUP}]"
        ) from None
    except tomllib.TOMLDecodeError as error:
        raise BadLoss(f"{folder / 'pyproject.toml'} is not TOML: {error}") from error
    source = folder / "src"
    with _on_path(source if source.is_dir() else folder):
        specs = [spec for module in modules.values() for spec in _registered(_import(module))]
    return _at_least_one(specs, f"the package in {folder}")


def _in_file(path: Path) -> list[LossSpec]:
    """The losses at the top level of a file."""
    name = "tinkerbell_tested_" + re.sub(r"\W", "_", path.stem)
    module_spec = importlib.util.spec_from_file_location(name, path)
    assert module_spec is not None
    assert module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[name] = module
    try:
        with _on_path(path.parent):
            module_spec.loader.exec_module(module)
    # broad: as above
    except (Exception, SystemExit) as error:
        raise BadLoss(f"{path} failed: {type(error).__name__}: {error}", traceback.format_exc()) from error
    specs = [value for value in vars(module).values() if isinstance(value, LossSpec)]
    return _at_least_one([spec for spec in specs if spec.fn.__module__ == name] or specs, str(path))


def _registered(module: ModuleType) -> Iterable[LossSpec]:
    hook = getattr(module, "register_losses", None)
    if hook is None:
        raise BadLoss(
            f"the module {module.__name__!r} has no function register_losses(): add one that returns its losses"
        )
    specs: Iterable[LossSpec] = hook()
    return specs


def _at_least_one(specs: list[LossSpec], source: str) -> list[LossSpec]:
    if not specs:
        raise UnknownLoss(f"{source} has no loss: decorate a function with @tinkerbell_core.loss")
    return specs


@contextmanager
def _on_path(folder: Path) -> Iterator[None]:
    sys.path.insert(0, str(folder.resolve()))
    try:
        yield
    finally:
        sys.path.remove(str(folder.resolve()))
