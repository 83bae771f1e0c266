"""A setting comes from a flag, else a variable, else tinkerbell.toml, else its default."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner, Result

import tinkerbell_server.launch
from tinkerbell_core.errors import BadRequest
from tinkerbell_server.cli import tinkerbell
from tinkerbell_server.config import Settings, declared


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Settings]:
    """The settings of each server that `serve` starts; the current folder is empty and no variable is set."""
    started: list[Settings] = []
    monkeypatch.setattr(tinkerbell_server.launch, "run", started.append)
    monkeypatch.chdir(tmp_path)
    for name in (*(setting.variable for setting in declared().values()), "TINKERBELL_TEST_DEVICE", "TINKERBELL_URL"):
        monkeypatch.delenv(name, raising=False)
    return started


def serve(*args: str, **environment: str) -> Result:
    return CliRunner().invoke(tinkerbell, ["serve", *args], env=environment)


def one(started: list[Any]) -> Settings:
    assert len(started) == 1
    settings = started[0]
    assert isinstance(settings, Settings)
    return settings


def test_a_flag_overrides_the_environment_which_overrides_the_file(started: list[Settings]) -> None:
    Path("tinkerbell.toml").write_text('port = 1001\nhost = "127.0.0.2"\ndtype = "float32"\n')
    answer = serve("--port", "1003", TINKERBELL_PORT="1002", TINKERBELL_HOST="127.0.0.3")
    assert answer.exit_code == 0, answer.output
    settings = one(started)
    assert (settings.port, settings.host, settings.dtype) == (1003, "127.0.0.3", "float32")


def test_serve_without_parameters_uses_the_declared_defaults(started: list[Settings], tmp_path: Path) -> None:
    assert serve().exit_code == 0
    assert one(started) == Settings()


def test_the_defaults_are_a_loopback_server_with_sandboxed_uploads() -> None:
    settings = Settings()
    assert (settings.host, settings.port, settings.uploads, settings.model) == ("127.0.0.1", 8000, "sandboxed", None)


def test_the_default_data_dir_is_in_the_data_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert Settings().data_path == tmp_path / "tinkerbell"
    monkeypatch.delenv("XDG_DATA_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Settings().data_path == tmp_path / ".local" / "share" / "tinkerbell"


def test_settings_in_code_read_neither_variables_nor_the_file(
    started: list[Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("tinkerbell.toml").write_text("port = 1001\n")
    monkeypatch.setenv("TINKERBELL_HOST", "127.0.0.3")
    assert (Settings().port, Settings().host) == (8000, "127.0.0.1")


OTHER_VALUES: dict[str, Any] = {
    "model": "here",
    "host": "127.0.0.2",
    "port": 81,
    "data_dir": "runs",
    "uploads": "trusted",
    "sandbox_seconds": 1.5,
    "sandbox_seconds_per_token": 0.5,
    "dry_run_seconds": 2.0,
    "sandbox_memory": 512,
    "dotted_losses": True,
    "auth": "on",
    "ssl_certfile": "c.pem",
    "ssl_keyfile": "k.pem",
    "body_limit": 8,
    "rate_limit": 60,
    "concurrency_limit": 4,
    "queue_limit": 32,
    "queue_memory": 16,
    "result_limit": 7,
    "session_limit": 6,
    "model_limit": 5,
    "parameter_limit": 1_000,
    "upload_limit": 9,
    "device": "cpu",
    "dtype": "float32",
    "attn": "eager",
    "revision": "v2",
    "trust_remote_code": True,
    "micro_batch_tokens": 512,
    "logits_budget": 1_000_000,
    "gradient_checkpointing": True,
    "base_dropout": True,
    "plugins": False,
    "disabled_plugins": ("a:b", "c"),
    "required_plugins": ("d",),
    "chat_tokens": "all",
    "add_end_of_text": False,
    "engine": "my.engine",
}


def test_every_setting_is_a_key_of_the_file(started: list[Settings]) -> None:
    Path("tinkerbell.toml").write_text("\n".join(f"{name} = {toml(value)}" for name, value in OTHER_VALUES.items()))
    answer = serve()
    assert answer.exit_code == 0, answer.output
    assert one(started) == Settings(**OTHER_VALUES)


def test_every_setting_is_a_variable(started: list[Settings]) -> None:
    answer = serve(**{declared()[name].variable: text(value) for name, value in OTHER_VALUES.items()})
    assert answer.exit_code == 0, answer.output
    assert one(started) == Settings(**OTHER_VALUES)


def test_every_setting_is_an_option_or_the_argument(started: list[Settings]) -> None:
    answer = serve(*(word for name, value in OTHER_VALUES.items() for word in words(name, value)))
    assert answer.exit_code == 0, answer.output
    assert one(started) == Settings(**OTHER_VALUES)


def test_every_setting_has_another_value_in_these_tests() -> None:
    assert list(OTHER_VALUES) == list(declared())
    assert not [name for name, value in OTHER_VALUES.items() if value == declared()[name].default]


def toml(value: Any) -> str:
    return msgspec.json.encode(value).decode()  # strings, numbers, booleans and lists look the same in TOML


def text(value: Any) -> str:
    return " ".join(value) if isinstance(value, tuple) else str(value)


def words(name: str, value: Any) -> list[str]:
    flag = declared()[name].flag
    if name == "model":
        return [value]
    if isinstance(value, tuple):
        return [word for each in value for word in (flag, each)]
    if isinstance(value, bool):
        return [flag if value else f"--no-{name.replace('_', '-')}"]
    return [flag, str(value)]


def test_an_unknown_key_in_the_file_is_an_error_that_names_the_nearest(started: list[Settings]) -> None:
    Path("tinkerbell.toml").write_text("prot = 1001\n")
    answer = serve()
    assert answer.exit_code == 2
    assert "tinkerbell.toml has no setting 'prot'; did you mean 'port'?" in answer.output
    assert not started


def test_an_unknown_variable_is_an_error_that_names_the_nearest(started: list[Settings]) -> None:
    answer = serve(TINKERBELL_PROT="1001")
    assert answer.exit_code == 2
    assert "TINKERBELL_PROT" in answer.output
    assert "did you mean 'TINKERBELL_PORT'?" in answer.output
    assert not started


def test_a_wrong_value_in_the_file_is_an_error_that_names_the_file_and_the_limit(started: list[Settings]) -> None:
    Path("tinkerbell.toml").write_text("port = 70000\n")
    answer = serve()
    assert answer.exit_code == 2
    assert "tinkerbell.toml: port must be an integer >= 0 and <= 65535, but is 70000" in answer.output
    Path("tinkerbell.toml").write_text('disabled_plugins = "abc"\n')
    assert "disabled_plugins must be a list of strings, but is 'abc'" in serve().output
    assert not started


def test_a_wrong_value_in_a_variable_is_an_error_that_names_the_variable(started: list[Settings]) -> None:
    answer = serve(TINKERBELL_PORT="70000")
    assert answer.exit_code == 2
    assert "Invalid value for TINKERBELL_PORT: 70000 is not in the range 0<=x<=65535" in answer.output
    assert not started


def test_a_wrong_value_of_an_option_is_an_error_that_names_the_option(started: list[Settings]) -> None:
    answer = serve("--uploads", "trust", TINKERBELL_UPLOADS="off")
    assert answer.exit_code == 2
    assert "Invalid value for '--uploads': 'trust' is not one of 'off', 'sandboxed', 'trusted'" in answer.output
    assert not started


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"auth": "maybe"}, "auth must be 'auto', 'on' or 'off', but is 'maybe'"),
        ({"ssl_keyfile": "k.pem"}, "TLS needs the certificate too"),
        ({"sandbox_seconds": 0}, "sandbox_seconds must be a number > 0 and <= 86400, but is 0"),
        ({"sandbox_seconds": float("nan")}, "but is nan"),
        ({"sandbox_seconds_per_token": -1.0}, "sandbox_seconds_per_token must be a number >= 0"),
        ({"sandbox_memory": 255}, "sandbox_memory must be an integer >= 256, but is 255"),
        ({"queue_limit": 1}, "queue_limit must be an integer >= 2, but is 1"),
        ({"upload_limit": 0}, "upload_limit must be an integer >= 1"),
        ({"rate_limit": -1}, "rate_limit must be an integer >= 0"),
        ({"port": "80"}, "port must be an integer >= 0 and <= 65535, but is '80'"),
        ({"plugins": 1}, "plugins must be true or false, but is 1"),
        ({"host": None}, "host must be a string, but is None"),
        ({"host": "0.0.0.0", "uploads": "trusted"}, "refused on host '0.0.0.0'"),
    ],
)
def test_a_wrong_value_in_code_is_an_error_that_names_the_limit(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(BadRequest) as caught:
        Settings(**settings)
    assert message in caught.value.message


def test_settings_are_the_same_after_they_were_sent_to_another_process() -> None:
    settings = Settings(**OTHER_VALUES)
    assert Settings.from_json(settings.to_json()) == settings


def test_the_variables_of_the_client_are_not_reported_as_unknown_settings(started: list[Settings]) -> None:
    assert serve(TINKERBELL_URL="http://x", TINKERBELL_API_KEY="k", TINKERBELL_TEST_DEVICE="cpu").exit_code == 0
    assert len(started) == 1


def test_help_does_not_read_the_file(started: list[Settings]) -> None:
    Path("tinkerbell.toml").write_text("= invalid")
    assert serve("--help").exit_code == 0
    assert "is not TOML" in serve().output


def test_the_help_shows_each_option_with_its_description() -> None:
    shown = " ".join(serve("--help").output.split())
    for setting in declared().values():
        assert setting.flag in shown
        if setting.name != "model":  # click describes options only
            assert setting.description in shown


def test_trusted_uploads_are_refused_off_loopback(started: list[Settings]) -> None:
    answer = serve("--uploads", "trusted", "--host", "0.0.0.0")
    assert answer.exit_code == 1
    assert "refused on host '0.0.0.0'" in answer.output
    assert not started


def test_the_error_for_a_missing_extra_names_the_command_to_install_it(
    started: list[Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tinkerbell_server.cli.serve.NEEDED", ("click", "no_such_package"))
    answer = serve()
    assert answer.exit_code == 1
    assert "serving needs no_such_package" in answer.output
    assert "pip install 'tinkerbell-core[server]'" in answer.output
