"""A loss is found by name, id or version, and an error lists the known ones."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tinkerbell_core.decorator import loss
from tinkerbell_core.errors import AmbiguousLoss, BadUpload, UnknownLoss
from tinkerbell_core.registry import LossRegistry, resolve
from tinkerbell_core.spec import LossSpec, Provenance
from tinkerbell_core.types import LossDescription


def spec(name: str, digest: str = "a" * 64, distribution: str | None = None) -> LossSpec:
    def fn(model_outputs: Any, loss_fn_inputs: Any, attention_mask: Any) -> Any: ...

    kind = Provenance("entry_point", distribution, "1.0") if distribution else Provenance("upload", owner="me")
    return replace(loss(fn), name=name, digest=digest, provenance=kind)


PLUGIN = spec("dpo", distribution="tinkerbell-loss-dpo")
OLD = spec("mine", "1" * 64)
NEW = spec("mine", "2" * 64)


def test_a_loss_is_found_by_name_and_by_id() -> None:
    registry = LossRegistry([PLUGIN])
    assert registry.get("dpo") is PLUGIN
    assert registry.get("tinkerbell-loss-dpo:dpo") is PLUGIN


def test_a_name_means_the_latest_upload_and_older_versions_are_kept() -> None:
    registry = LossRegistry([OLD, NEW])
    assert registry.get("mine") is NEW
    assert registry.get("mine@1111") is OLD
    assert registry.get("upload:me/mine@" + "1" * 12) is OLD
    assert registry.get("upload:me/mine@" + "1" * 64) is OLD
    assert registry.get("upload:me/mine") is NEW


def test_uploading_an_old_version_again_makes_it_the_latest() -> None:
    registry = LossRegistry([OLD, NEW, OLD])
    assert registry.get("mine") is OLD
    assert len(registry) == 2


def test_a_plugin_loss_is_found_by_version() -> None:
    registry = LossRegistry([PLUGIN])
    assert registry.get("dpo@aaaa") is PLUGIN
    assert registry.get("tinkerbell-loss-dpo:dpo@aaaa") is PLUGIN


def test_the_error_for_an_unknown_version_lists_the_known_ones() -> None:
    with pytest.raises(UnknownLoss, match="no version 'mine@3'; available: mine@111111111111, mine@222222222222"):
        LossRegistry([OLD, NEW]).get("mine@3")


def test_the_error_for_an_unknown_name_suggests_a_similar_one() -> None:
    with pytest.raises(UnknownLoss, match=r"no loss named 'dpoo'; did you mean 'dpo'\? \(available: dpo, mine\)"):
        LossRegistry([PLUGIN, OLD]).get("dpoo")


def test_the_error_of_an_empty_registry_lists_none() -> None:
    with pytest.raises(UnknownLoss, match="available: none"):
        LossRegistry().get("")


def test_a_digest_prefix_that_matches_two_losses_is_ambiguous() -> None:
    near = spec("mine", "1" * 20 + "2" * 44)
    near_id = spec("mine", "13" + "2" * 62)
    assert LossRegistry([OLD, near_id]).get("mine@11") is OLD
    with pytest.raises(AmbiguousLoss, match="2 losses are named"):
        resolve("mine@11", [OLD, near])


def test_descriptions_are_found_like_their_specs() -> None:
    specs = [PLUGIN, spec("dpo", distribution="other"), OLD, NEW]
    descriptions = [LossDescription.of(s) for s in specs]
    for name in ("mine", "mine@1", "other:dpo"):
        assert resolve(name, descriptions).id == resolve(name, specs).id
    for name, error in {"dpo": AmbiguousLoss, "nine": UnknownLoss}.items():
        with pytest.raises(error) as of_specs:
            resolve(name, specs)
        with pytest.raises(error) as of_descriptions:
            resolve(name, descriptions)
        assert str(of_specs.value) == str(of_descriptions.value)


def test_a_loss_can_be_removed() -> None:
    registry = LossRegistry([OLD])
    registry.remove(OLD.id)
    assert OLD.id not in registry
    with pytest.raises(UnknownLoss):
        registry.remove(OLD.id)


@pytest.mark.parametrize(
    "name", ["dpo", "DPO", "\uff44\uff50\uff4f", "custom", "", "<lambda>", "a:b", "a@b", "a/b", "a.b", "1a", "a" * 65]
)
def test_an_upload_cannot_have_the_name_of_a_plugin_loss_or_a_malformed_one(name: str) -> None:
    with pytest.raises(BadUpload):
        LossRegistry([PLUGIN]).check_upload_name(name)


@pytest.mark.parametrize("name", ["mine", "my_dpo", "dpo2", "größe", "my-loss"])
def test_an_upload_can_have_any_other_name(name: str) -> None:
    LossRegistry([PLUGIN, OLD]).check_upload_name(name)


def test_two_owners_of_one_name_have_two_ids_and_the_name_means_the_last() -> None:
    other = replace(NEW, provenance=Provenance("upload", owner="public"))
    registry = LossRegistry([other, NEW])
    assert [loss.id for loss in registry] == ["upload:public/mine@" + "2" * 12, "upload:me/mine@" + "2" * 12]
    assert registry.get("mine") is NEW
    assert registry.get("mine@2222") is NEW
    assert registry.get(other.id) is other
