"""A setting comes from the flag, else the environment, else tinkerbell.toml, else its default."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import tinkerbell_server.launch
from tinkerbell_server.cli import tinkerbell
from tinkerbell_server.config import Settings

Serve = Callable[..., Result]


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Settings]:
    """What `serve` would start with; the current folder is empty and the environment clean."""
    started: list[Settings] = []
    monkeypatch.setattr(tinkerbell_server.launch, "run", started.append)
    monkeypatch.chdir(tmp_path)
    for name in ("TINKERBELL_PORT", "TINKERBELL_DATA_DIR", "TINKERBELL_TEST_DEVICE", "TINKERBELL_URL"):
        monkeypatch.delenv(name, raising=False)
    return started


def serve(*args: str, **environment: str) -> Result:
    return CliRunner().invoke(tinkerbell, ["serve", *args], env=environment)


def one(started: list[Any]) -> Settings:
    assert len(started) == 1
    settings = started[0]
    assert isinstance(settings, Settings)
    return settings


def test_a_flag_is_over_the_environment_and_that_over_the_file(served: list[Settings]) -> None:
    Path("tinkerbell.toml").write_text('port = 1001\nhost = "127.0.0.2"\ndtype = "float32"\n')
    answer = serve("--port", "1003", TINKERBELL_PORT="1002", TINKERBELL_HOST="127.0.0.3")
    assert answer.exit_code == 0, answer.output
    settings = one(served)
    assert (settings.port, settings.host, settings.dtype) == (1003, "127.0.0.3", "float32")


def test_the_defaults_are_a_loopback_server_with_sandboxed_uploads(served: list[Settings], tmp_path: Path) -> None:
    assert serve(XDG_DATA_HOME=str(tmp_path)).exit_code == 0
    settings = one(served)
    assert (settings.host, settings.port, settings.uploads, settings.model) == ("127.0.0.1", 8000, "sandboxed", None)
    assert settings.data_dir == str(tmp_path / "tinkerbell")


def test_every_setting_of_the_file_is_read(served: list[Settings]) -> None:
    Path("tinkerbell.toml").write_text(
        'model = "here"\nplugins = false\ndisabled_plugins = ["a:b", "c"]\nmicro_batch_tokens = 512\n'
        'data_dir = "runs"\nuploads = "trusted"\ntrust_remote_code = true\n'
        'auth = "on"\nssl_certfile = "c.pem"\nssl_keyfile = "k.pem"\n'
        "body_limit = 8\nrate_limit = 60\nconcurrency_limit = 4\nqueue_limit = 32\nupload_limit = 9\n"
        "logits_budget = 1000000\ngradient_checkpointing = true\n"
    )
    answer = serve()
    assert answer.exit_code == 0, answer.output
    settings = one(served)
    assert settings.model == "here"
    assert not settings.plugins
    assert settings.disabled_plugins == ("a:b", "c")
    assert settings.micro_batch_tokens == 512
    assert settings.trust_remote_code
    assert (settings.auth, settings.ssl_certfile, settings.ssl_keyfile) == ("on", "c.pem", "k.pem")
    assert (settings.body_limit, settings.rate_limit) == (8, 60)
    assert (settings.concurrency_limit, settings.queue_limit, settings.upload_limit) == (4, 32, 9)
    assert settings.logits_budget == 1_000_000
    assert settings.gradient_checkpointing


def test_an_unknown_key_in_the_file_is_an_error_that_names_the_nearest(served: list[Settings]) -> None:
    Path("tinkerbell.toml").write_text("prot = 1001\n")
    answer = serve()
    assert answer.exit_code == 2
    assert "tinkerbell.toml has no setting 'prot'; did you mean 'port'?" in answer.output
    assert not served


def test_an_unknown_variable_is_an_error_that_names_the_nearest(served: list[Settings]) -> None:
    answer = serve(TINKERBELL_PROT="1001")
    assert answer.exit_code == 2
    assert "TINKERBELL_PROT" in answer.output
    assert "did you mean 'TINKERBELL_PORT'?" in answer.output
    assert not served


def test_the_clients_variables_are_no_misspelt_settings(served: list[Settings]) -> None:
    assert serve(TINKERBELL_URL="http://x", TINKERBELL_API_KEY="k", TINKERBELL_TEST_DEVICE="cpu").exit_code == 0
    assert len(served) == 1


def test_help_does_not_mind_a_broken_file(served: list[Settings]) -> None:
    Path("tinkerbell.toml").write_text("= what")
    assert serve("--help").exit_code == 0
    assert "is not TOML" in serve().output


def test_trusted_uploads_are_refused_off_loopback(served: list[Settings]) -> None:
    answer = serve("--uploads", "trusted", "--host", "0.0.0.0")
    assert answer.exit_code == 1
    assert "refused on host '0.0.0.0'" in answer.output
    assert not served


def test_a_missing_extra_is_a_sentence_that_says_what_to_install(
    served: list[Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tinkerbell_server.cli.serve.NEEDED", ("click", "no_such_package"))
    answer = serve()
    assert answer.exit_code == 1
    assert "serving needs no_such_package" in answer.output
    assert "pip install 'tinkerbell-core[server]'" in answer.output
