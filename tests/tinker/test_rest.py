"""What a RestClient sees of a run, and what it does to its checkpoints."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import httpx
import pytest
import tinker

from tests.tinker.sdk import datum, new_model, now, text


@pytest.fixture(scope="module")
def rest(service: tinker.ServiceClient) -> Any:
    return now(service.create_rest_client())


@pytest.fixture(scope="module")
def run(service: tinker.ServiceClient, model_folder: Path) -> Any:
    """A model with a state and a sampler saved."""
    model = new_model(service, model_folder, user_metadata={"purpose": "test"})
    model.forward_backward([datum(text(8), weights=[1.0] * 7)], "cross_entropy").result()
    model.save_state("state").result()
    model.save_weights_for_sampler("sampler").result()
    return model


def names(rest: Any, run_id: str) -> set[str]:
    return {checkpoint.checkpoint_id for checkpoint in rest.list_checkpoints(run_id).result().checkpoints}


def test_a_run_is_listed_with_what_was_saved_of_it(rest: Any, run: Any, model_folder: Path) -> None:
    told = rest.get_training_run(run.model_id).result()
    assert (told.base_model, told.is_lora, told.lora_rank) == (str(model_folder), True, 4)
    assert told.last_checkpoint.checkpoint_id == "weights/state"
    assert told.last_sampler_checkpoint.tinker_path == f"tinker://{run.model_id}/sampler_weights/sampler"
    assert told.user_metadata == {"purpose": "test"}
    page = rest.list_training_runs(limit=1, offset=0).result()
    assert len(page.training_runs) == 1
    assert page.cursor.total_count >= 1
    everything = rest.list_training_runs(limit=1000, offset=0).result().training_runs
    assert run.model_id in [one.training_run_id for one in everything]
    mine = rest.list_user_checkpoints(limit=1000).result().checkpoints
    assert f"tinker://{run.model_id}/weights/state" in [one.tinker_path for one in mine]


def test_weights_say_what_they_are_for(rest: Any, run: Any, model_folder: Path) -> None:
    info = rest.get_weights_info_by_tinker_path(f"tinker://{run.model_id}/weights/state").result()
    assert (info.base_model, info.is_lora, info.lora_rank) == (str(model_folder), True, 4)


def test_a_session_knows_its_runs(rest: Any, run: Any) -> None:
    session_id = run.model_id.partition(":")[0]
    assert run.model_id in rest.get_session(session_id).result().training_run_ids
    assert session_id in rest.list_sessions(limit=1000).result().sessions


def test_a_sampler_says_its_base_and_path(
    service: tinker.ServiceClient, rest: Any, run: Any, model_folder: Path
) -> None:
    path = f"tinker://{run.model_id}/sampler_weights/sampler"
    sampler = now(service.create_sampling_client(model_path=path))
    assert sampler.get_base_model() == str(model_folder)
    assert len(sampler.get_tokenizer().encode("hi")) == 2


def test_a_checkpoint_is_deleted(rest: Any, run: Any) -> None:
    run.save_state("short-lived").result()
    assert "weights/short-lived" in names(rest, run.model_id)
    rest.delete_checkpoint(run.model_id, "weights/short-lived").result()
    assert "weights/short-lived" not in names(rest, run.model_id)
    with pytest.raises(tinker.NotFoundError, match="no checkpoint"):
        rest.delete_checkpoint(run.model_id, "weights/short-lived").result()


def test_a_checkpoint_is_published_and_has_a_time_to_live(rest: Any, run: Any) -> None:
    path = f"tinker://{run.model_id}/weights/state"

    def told() -> Any:
        return next(one for one in rest.list_checkpoints(run.model_id).result().checkpoints if one.tinker_path == path)

    rest.publish_checkpoint_from_tinker_path(path).result()
    assert told().public
    rest.unpublish_checkpoint_from_tinker_path(path).result()
    assert not told().public
    rest.set_checkpoint_ttl_from_tinker_path(path, 3600).result()
    assert told().expires_at is not None
    rest.set_checkpoint_ttl_from_tinker_path(path, None).result()
    assert told().expires_at is None
    with pytest.raises(tinker.BadRequestError, match="ttl_seconds"):
        rest.set_checkpoint_ttl_from_tinker_path(path, -5).result()


def test_external_weights_are_files_that_peft_reads(rest: Any, run: Any) -> None:
    if not hasattr(run, "save_weights_external"):
        pytest.skip("this SDK cannot save for others")
    path = run.save_weights_external("outside").result().path
    assert path == f"tinker://{run.model_id}/external_weights/outside"
    urls = rest.get_external_weights_urls(path).result().urls
    assert sorted(urls) == ["adapter_config.json", "adapter_model.safetensors"]
    assert httpx.get(urls["adapter_config.json"], trust_env=False).json()["r"] == 4


def test_an_archive_is_a_tar_behind_a_link(server: str, run: Any) -> None:
    url = f"{server}/api/v1/training_runs/{run.model_id}/checkpoints/sampler_weights/sampler/archive"
    answer = httpx.get(url, trust_env=False)
    assert answer.status_code == 302
    assert "Expires" in answer.headers
    content = httpx.get(answer.headers["location"], trust_env=False).content
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        assert sorted(tar.getnames()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert httpx.get(answer.headers["location"] + "x", trust_env=False).status_code == 410


def test_a_run_of_nobody_is_not_found(rest: Any) -> None:
    for ask in (rest.get_training_run, rest.list_checkpoints):
        with pytest.raises(tinker.NotFoundError, match="no training run"):
            ask("nobody:train:0").result()
