"""The generated tables in docs are current with the registry, the bundled records and the settings."""

from __future__ import annotations

from tests.tables import OPENAI, PEERS, SETTINGS, WHICH, losses, peers, with_table
from tinkerbell_core.registry import build_registry
from tinkerbell_server.api.openai.fields import fields_table
from tinkerbell_server.cli.settings import settings_table

WRITE_AGAIN = "out of date: run python -m tests.tables"


def test_the_table_of_losses_is_current() -> None:
    page = WHICH.read_text()
    assert page == with_table(page, "losses", losses()), WRITE_AGAIN


def test_the_page_recommends_existing_losses() -> None:
    import re

    registry, _ = build_registry()
    advice = WHICH.read_text().partition("<!-- losses")[0]
    for name in re.findall(r"^\| [^|]+ \| `(\w+)`", advice, re.MULTILINE):
        registry.get(name)


def test_the_table_of_matches_is_current() -> None:
    page = PEERS.read_text()
    assert page == with_table(page, "peers", peers()), WRITE_AGAIN


def test_the_table_of_settings_is_current() -> None:
    page = SETTINGS.read_text()
    assert page == with_table(page, "settings", settings_table()), WRITE_AGAIN


def test_the_table_of_the_fields_of_the_openai_api_is_current() -> None:
    page = OPENAI.read_text()
    assert page == with_table(page, "fields", fields_table()), WRITE_AGAIN
