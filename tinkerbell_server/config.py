"""The settings of a server. Each is declared once: type, bounds, default and description.

The command line, the environment variables, the keys of tinkerbell.toml, the table in the documentation and the
configuration of the engine process are all made from this declaration.
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, get_args, get_type_hints

import msgspec
from msgspec import Meta, inspect

VARIABLE_PREFIX = "TINKERBELL_"


def _about(description: str, **extra: str) -> Meta:
    """What the declaration of a setting adds to its type.

    default: text that stands for the default None. flag: the option, if it is not `--` and the name. argument: the
    setting is a positional argument with this placeholder. metavar: the placeholder of the option's value.
    """
    return Meta(description=description, extra=dict(extra))


_Seconds = Annotated[float, Meta(gt=0, le=86_400)]
_Count = Annotated[int, Meta(ge=1)]


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """The settings of one server. Construction reads neither the environment nor files.

    Raises BadRequest if a value is not allowed.
    """

    model: Annotated[
        str | None,
        _about(
            "Base model: an id on the Hugging Face hub or a local folder.",
            default="the embedded tiny model",
            argument="[MODEL]",
        ),
    ] = None
    host: Annotated[str, _about("Address to listen on.")] = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535), _about("Port to listen on; 0 selects a free port.")] = 8000
    data_dir: Annotated[
        str | None,
        _about(
            "Folder for models, results, uploads, API keys and the audit log.",
            default="$XDG_DATA_HOME/tinkerbell, or ~/.local/share/tinkerbell",
            metavar="DIRECTORY",
        ),
    ] = None
    uploads: Annotated[
        Literal["off", "sandboxed", "trusted"],
        _about(
            "How uploaded losses run: not at all, in locked-down processes, or with the rights of the server "
            "(only on a loopback address)."
        ),
    ] = "sandboxed"
    sandbox_seconds: Annotated[_Seconds, _about("Time limit of one call of an uploaded loss, in seconds.")] = 10.0
    sandbox_seconds_per_token: Annotated[
        float,
        Meta(ge=0, le=86_400),
        _about("Seconds added to this time limit for each padded token of the batch."),
    ] = 0.002
    dry_run_seconds: Annotated[_Seconds, _about("Time limit of the trial of an upload, in seconds.")] = 5.0
    sandbox_memory: Annotated[
        Annotated[int, Meta(ge=256)] | None,
        _about("Memory limit of one sandbox process, in MiB.", default="a quarter of the memory, 2 to 16 GiB"),
    ] = None
    dotted_losses: Annotated[
        bool,
        _about(
            "Import a loss that a request names as my.module:function, with the rights of the server "
            "(only on a loopback address)."
        ),
    ] = False
    auth: Annotated[
        Literal["auto", "on", "off"],
        _about(
            "When requests need an API key. auto: once a key was created, and always if the address is not loopback."
        ),
    ] = "auto"
    ssl_certfile: Annotated[
        str | None, _about("Certificate chain (PEM); the server then speaks https.", default="http", metavar="FILE")
    ] = None
    ssl_keyfile: Annotated[
        str | None,
        _about("Private key (PEM, without a password).", default="the key in ssl_certfile", metavar="FILE"),
    ] = None
    body_limit: Annotated[_Count, _about("Size limit of a forward or forward_backward request, in MiB.")] = 256
    rate_limit: Annotated[int, Meta(ge=0), _about("Requests that one key may send in a minute; 0: no limit.")] = 6000
    concurrency_limit: Annotated[_Count, _about("Requests of one key that may run at the same time.")] = 512
    queue_limit: Annotated[
        int,
        Meta(ge=2),
        _about("Requests that may wait for the engine; those of one tenant may fill half of the queue."),
    ] = 2048
    queue_memory: Annotated[
        _Count, _about("Size of the bodies of one tenant's requests that have not ended, together, in MiB.")
    ] = 1024
    result_limit: Annotated[
        _Count, _about("Size of the results that the server keeps for one tenant until they are fetched, in MiB.")
    ] = 1024
    session_limit: Annotated[_Count, _about("Open sessions of Tinker clients of one tenant.")] = 1000
    model_limit: Annotated[_Count, _about("Models that one tenant may have.")] = 256
    parameter_limit: Annotated[
        _Count | None,
        _about(
            "Parameters that the models of one tenant may train, together.",
            default="half of those for which the memory (GPU or RAM) that is free at the start is sufficient",
        ),
    ] = None
    upload_limit: Annotated[_Count, _about("Versions of uploaded losses that one tenant may keep.")] = 1000
    device: Annotated[str, _about("Device of the model: auto, cpu, cuda or cuda:<i>.")] = "auto"
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float64"],
        _about("Data type of the weights. auto: bfloat16 on a GPU, float32 on a CPU."),
    ] = "auto"
    attn: Annotated[
        str | None, _about("Attention implementation, by its name in transformers.", default="the model's own")
    ] = None
    revision: Annotated[
        str | None, _about("Revision of a model on the hub.", default="the main branch of the model")
    ] = None
    trust_remote_code: Annotated[bool, _about("Run Python code that the model's repository contains.")] = False
    micro_batch_tokens: Annotated[
        _Count | None,
        _about("Padded tokens in one forward pass, at most.", default="chosen for the device"),
    ] = None
    logits_budget: Annotated[
        Annotated[int, Meta(ge=0)] | None,
        _about(
            "Bytes of stored logits that one loss may use.",
            default="an eighth of the memory (GPU or RAM) that is free at the start",
        ),
    ] = None
    gradient_checkpointing: Annotated[
        bool, _about("Store fewer activations of each layer and compute them again in the backward pass.")
    ] = False
    base_dropout: Annotated[
        bool, _about("Use the dropout that the configuration of the base model asks for, in training.")
    ] = False
    plugins: Annotated[bool, _about("Load installed plugins in addition to the built-in losses.")] = True
    disabled_plugins: Annotated[
        tuple[str, ...],
        _about("Plugin or distribution that is not loaded; repeatable.", default="none", flag="--disable-plugin"),
    ] = ()
    required_plugins: Annotated[
        tuple[str, ...],
        _about(
            "Plugin that must load, otherwise the server does not start; repeatable.",
            default="none",
            flag="--require-plugin",
        ),
    ] = ()
    chat_tokens: Annotated[Literal["assistant", "all"], _about("Tokens of a chat that have weight 1 in training.")] = (
        "assistant"
    )
    add_end_of_text: Annotated[
        bool, _about("End strings, and answers that are strings, with the end-of-text token of the tokenizer.")
    ] = True
    engine: Annotated[str, _about("Import path of the module that creates the engine.")] = (
        "tinkerbell_server.engines.torch"
    )

    def __post_init__(self) -> None:
        for name, setting in declared().items():
            setting.check(getattr(self, name))
        if self.uploads == "trusted" and not self.on_loopback:
            _refuse(
                "uploads must not be 'trusted', which runs uploaded code with the rights of the server, on an address "
                f"that others can reach: it is refused on host {self.host!r}; use host 127.0.0.1 or uploads 'sandboxed'"
            )
        if self.dotted_losses and not self.on_loopback:
            _refuse(
                "dotted_losses, which imports the module that a request names, must be off on an address that others "
                f"can reach: it is refused on host {self.host!r}; use host 127.0.0.1 or install the loss as a plugin"
            )
        if self.ssl_keyfile is not None and self.ssl_certfile is None:
            _refuse("ssl_keyfile needs ssl_certfile: TLS needs the certificate too")

    @property
    def on_loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @property
    def data_path(self) -> Path:
        """The absolute path of the data dir."""
        if self.data_dir is not None:
            return Path(self.data_dir).expanduser().resolve()
        base = os.environ.get("XDG_DATA_HOME")
        return (Path(base) if base else Path.home() / ".local" / "share").resolve() / "tinkerbell"

    def to_json(self) -> bytes:
        """The settings as they are sent to another process."""
        return msgspec.json.encode(self)

    @classmethod
    def from_json(cls, text: bytes | str) -> Settings:
        """The settings that `to_json` encoded."""
        return msgspec.json.decode(text, type=cls)


class Setting(msgspec.Struct, frozen=True, kw_only=True):
    """The declaration of one setting. type: without its None. Any: a value of that type."""

    name: str
    hint: Any
    type: inspect.Type
    default: Any
    description: str
    extra: Mapping[str, str]

    @property
    def flag(self) -> str:
        """The option on the command line; the placeholder if the setting is an argument."""
        return self.extra.get("argument") or self.extra.get("flag") or "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        """The environment variable."""
        return VARIABLE_PREFIX + self.name.upper()

    @property
    def choices(self) -> tuple[str, ...]:
        """All allowed values, if they are listed."""
        if not isinstance(self.type, inspect.LiteralType):
            return ()
        literal, *_ = get_args(self.hint)  # msgspec sorts the values
        return get_args(literal)

    @property
    def default_text(self) -> str:
        """The default, as the documentation shows it."""
        text = self.extra.get("default") or str(self.default)
        return text.lower() if isinstance(self.default, bool) else text

    @property
    def allowed(self) -> str:
        """What a value must be, as the end of a sentence: `an integer >= 1`."""
        match self.type:
            case inspect.LiteralType():
                *others, last = map(repr, self.choices)
                return f"{', '.join(others)} or {last}"
            case inspect.IntType() | inspect.FloatType():
                kind = "an integer" if isinstance(self.type, inspect.IntType) else "a number"
                bounds = {">": self.type.gt, ">=": self.type.ge, "<": self.type.lt, "<=": self.type.le}
                return " ".join(
                    [kind, " and ".join(f"{sign} {bound}" for sign, bound in bounds.items() if bound is not None)]
                )
            case inspect.BoolType():
                return "true or false"
            case inspect.VarTupleType():
                return "a list of strings"
            case _:
                return "a string"

    def check(self, value: object, *, strict: bool = True) -> None:
        """Raise BadRequest if the value is not allowed. strict=False: a string may hold a number."""
        try:
            msgspec.convert(value, self.hint, strict=strict)
        except msgspec.ValidationError:
            _refuse(f"{self.name} must be {self.allowed}, but is {repr(value)[:100]}")


@cache
def declared() -> dict[str, Setting]:
    """Every setting by name, in the order of declaration."""
    hints = get_type_hints(Settings, include_extras=True)
    info = inspect.type_info(Settings)
    assert isinstance(info, inspect.StructType)
    settings = {}
    for field in info.fields:
        assert isinstance(field.type, inspect.Metadata)
        settings[field.name] = Setting(
            name=field.name,
            hint=hints[field.name],
            type=_without_none(field.type.type),
            default=field.default,
            description=(field.type.extra_json_schema or {})["description"],
            extra=field.type.extra or {},
        )
    return settings


def _without_none(type_: inspect.Type) -> inspect.Type:
    if not isinstance(type_, inspect.UnionType):
        return type_
    (only,) = (each for each in type_.types if not isinstance(each, inspect.NoneType))
    return only


def _refuse(message: str) -> NoReturn:
    # imported here: `tinkerbell serve --help` reads the declaration and should not wait for the core's plugin system
    from tinkerbell_core.errors import BadRequest

    raise BadRequest(message)
