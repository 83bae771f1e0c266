"""The RestClient lists runs and sessions, and publishes, copies and deletes checkpoints."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import httpx
import pytest
import tinker
from tinker import types

from tests.tinker.raw_client import RawClient
from tests.tinker.sdk import close, datum, new_model, now, since, text


@pytest.fixture(scope="module")
def rest(service: tinker.ServiceClient) -> Any:
    return now(service.create_rest_client())


@pytest.fixture(scope="module")
def run(service: tinker.ServiceClient, model_folder: Path) -> Any:
    """A model with a saved state and a saved sampler."""
    model = new_model(service, model_folder, user_metadata={"purpose": "test"})
    model.forward_backward([datum(text(8), weights=[1.0] * 7)], "cross_entropy").result()
    model.save_state("state").result()
    model.save_weights_for_sampler("sampler").result()
    return model


def names(rest: Any, run_id: str) -> set[str]:
    return {checkpoint.checkpoint_id for checkpoint in rest.list_checkpoints(run_id).result().checkpoints}


def test_a_run_is_listed_with_its_checkpoints(rest: Any, run: Any, model_folder: Path) -> None:
    listed = rest.get_training_run(run.model_id).result()
    assert (listed.base_model, listed.is_lora, listed.lora_rank) == (str(model_folder), True, 4)
    assert listed.last_checkpoint.checkpoint_id == "weights/state"
    assert listed.last_sampler_checkpoint.tinker_path == f"tinker://{run.model_id}/sampler_weights/sampler"
    assert listed.user_metadata == {"purpose": "test"}
    page = rest.list_training_runs(limit=1, offset=0).result()
    assert len(page.training_runs) == 1
    assert page.cursor.total_count >= 1
    everything = rest.list_training_runs(limit=1000, offset=0).result().training_runs
    assert run.model_id in [one.training_run_id for one in everything]
    mine = rest.list_user_checkpoints(limit=1000).result().checkpoints
    assert f"tinker://{run.model_id}/weights/state" in [one.tinker_path for one in mine]


def test_weights_info_has_the_base_model_and_the_rank(rest: Any, run: Any, model_folder: Path) -> None:
    info = rest.get_weights_info_by_tinker_path(f"tinker://{run.model_id}/weights/state").result()
    assert (info.base_model, info.is_lora, info.lora_rank) == (str(model_folder), True, 4)


def test_a_session_lists_its_runs(rest: Any, run: Any) -> None:
    session_id = run.model_id.partition(":")[0]
    assert run.model_id in rest.get_session(session_id).result().training_run_ids
    assert session_id in rest.list_sessions(limit=1000).result().sessions


def test_a_sampler_of_a_path_has_its_base_model_and_tokenizer(
    service: tinker.ServiceClient, rest: Any, run: Any, model_folder: Path
) -> None:
    path = f"tinker://{run.model_id}/sampler_weights/sampler"
    sampler = now(service.create_sampling_client(model_path=path))
    assert sampler.get_base_model() == str(model_folder)
    assert len(sampler.get_tokenizer().encode("hi")) == 2


def test_a_checkpoint_can_be_deleted_once(rest: Any, run: Any) -> None:
    run.save_state("short-lived").result()
    assert "weights/short-lived" in names(rest, run.model_id)
    rest.delete_checkpoint(run.model_id, "weights/short-lived").result()
    assert "weights/short-lived" not in names(rest, run.model_id)
    with pytest.raises(tinker.NotFoundError, match="no checkpoint"):
        rest.delete_checkpoint(run.model_id, "weights/short-lived").result()


def test_a_checkpoint_without_its_kind_is_a_bad_request(rest: Any, run: Any, server: str) -> None:
    with pytest.raises(tinker.BadRequestError, match="no kind: send weights/state or sampler_weights/state"):
        rest.delete_checkpoint(run.model_id, "state").result()
    folder = f"{server}/api/v1/training_runs/{run.model_id}/checkpoints"
    for method, path in (("POST", "state/publish"), ("DELETE", "state/publish"), ("PUT", "state/ttl")):
        answer = httpx.request(method, f"{folder}/{path}", json={}, trust_env=False)
        assert (answer.status_code, "weights" in answer.text) == (400, True)


def test_a_checkpoint_can_be_published_and_can_expire(rest: Any, run: Any) -> None:
    path = f"tinker://{run.model_id}/weights/state"

    def checkpoint() -> Any:
        return next(one for one in rest.list_checkpoints(run.model_id).result().checkpoints if one.tinker_path == path)

    rest.publish_checkpoint_from_tinker_path(path).result()
    assert checkpoint().public
    rest.unpublish_checkpoint_from_tinker_path(path).result()
    assert not checkpoint().public
    rest.set_checkpoint_ttl_from_tinker_path(path, 3600).result()
    assert checkpoint().expires_at is not None
    rest.set_checkpoint_ttl_from_tinker_path(path, None).result()
    assert checkpoint().expires_at is None
    with pytest.raises(tinker.BadRequestError, match="ttl_seconds"):
        rest.set_checkpoint_ttl_from_tinker_path(path, -5).result()


def test_external_weights_are_the_files_of_a_peft_adapter(rest: Any, run: Any) -> None:
    if not hasattr(run, "save_weights_external"):
        pytest.skip("this SDK has no save_weights_external")
    path = run.save_weights_external("outside").result().path
    assert path == f"tinker://{run.model_id}/external_weights/outside"
    urls = rest.get_external_weights_urls(path).result().urls
    assert sorted(urls) == ["adapter_config.json", "adapter_model.safetensors"]
    assert httpx.get(urls["adapter_config.json"], trust_env=False).json()["r"] == 4


def test_the_url_of_an_archive_redirects_to_a_tar_file(server: str, run: Any) -> None:
    url = f"{server}/api/v1/training_runs/{run.model_id}/checkpoints/sampler_weights/sampler/archive"
    answer = httpx.get(url, trust_env=False)
    assert answer.status_code == 302
    assert "Expires" in answer.headers
    content = httpx.get(answer.headers["location"], trust_env=False).content
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        assert sorted(tar.getnames()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert httpx.get(answer.headers["location"] + "x", trust_env=False).status_code == 410


def test_an_unknown_run_is_not_found(rest: Any) -> None:
    for get in (rest.get_training_run, rest.list_checkpoints):
        with pytest.raises(tinker.NotFoundError, match="no training run"):
            get("unknown:train:0").result()


@since("0.36", "RestClient.copy_weights")
def test_a_copy_of_a_checkpoint_is_kept_after_the_checkpoint_is_deleted(
    service: tinker.ServiceClient, rest: Any, run: Any
) -> None:
    source = run.save_state("to-copy").result().path
    copy = rest.copy_weights(source, "archive", ttl_seconds=7200).result()
    assert copy.endswith("/weights/to-copy")
    assert copy != source
    rest.delete_checkpoint(run.model_id, "weights/to-copy").result()
    row = [datum(text(8), weights=[1.0] * 7)]
    again = now(service.create_training_client_from_state_with_optimizer(copy))
    assert close(*(m.forward(row, "cross_entropy").result().metrics["loss:sum"] for m in (run, again)))
    copied = rest.get_training_run(copy.removeprefix("tinker://").partition("/")[0]).result()
    assert copied.last_checkpoint.expires_at is not None
    assert copy.split("/")[2] in [
        one.training_run_id for one in rest.list_training_runs(project_id="archive").result().training_runs
    ]
    with pytest.raises(tinker.NotFoundError, match="no checkpoint"):
        rest.copy_weights(source, "archive").result()
    with pytest.raises(tinker.BadRequestError, match="ttl_seconds"):
        rest.copy_weights(copy, "archive", ttl_seconds=5).result()


def test_an_idempotency_key_makes_one_copy_and_a_session_can_own_a_copy(run: Any, raw_client: RawClient) -> None:
    source = f"tinker://{run.model_id}/sampler_weights/sampler"
    body = {"source_path": source, "destination_project_id": "archive"}
    paths = [
        raw_client.http.post("/copy_weights", json=body, headers={"x-idempotency-key": key}).json()["tinker_path"]
        for key in ("one", "one", "other")
    ]
    assert (paths[0] == paths[1], paths[0] == paths[2]) == (True, False)
    mine = raw_client.post("copy_weights", source_path=source, session_id=raw_client.session, model_seq_id=700).json()
    assert mine["tinker_path"] == f"tinker://{raw_client.session}:train:700/sampler_weights/sampler"
    trained = raw_client.forward_backward(f"{raw_client.session}:train:700", 1)
    assert trained.status_code == 410
    assert "load one of its checkpoints" in trained.json()["detail"]
    refused = raw_client.post("copy_weights", source_path=source)
    assert (refused.status_code, "destination_project_id" in refused.json()["detail"]) == (400, True)


@since("0.36", "search_sessions")
@pytest.mark.filterwarnings("ignore:RestClient.search_sessions is experimental")
def test_sessions_are_found_by_their_names(server: str, rest: Any, model_folder: Path) -> None:
    about = {"purpose": "a search"}
    sessions = []
    for name in ("Nightly run one", "nightly run two", "another"):
        one = tinker.ServiceClient(base_url=server, display_name=name, user_metadata=about)
        sessions.append(new_model(one, model_folder).model_id.partition(":")[0])

    def found(**wanted: Any) -> list[str]:
        request = types.SessionSearchRequest(user_metadata=about, **wanted)
        ids: list[str] = []
        while True:
            page = rest.search_sessions(request).result()
            ids += [session.session_id for session in page.sessions]
            if page.next_cursor is None:
                return ids
            request = request.model_copy(update={"cursor": page.next_cursor})

    assert found() == found(limit=1) == sessions[::-1]
    assert found(display_name="RUN night") == sessions[1::-1]
    assert found(display_name="two", session_id=sessions[2]) == [sessions[2], sessions[1]]
    assert found(statuses=[{"type": "active"}]) == sessions[::-1]
    assert found(statuses=[{"type": "client_finished"}]) == found(project_ids=["unknown"]) == []
    page = rest.search_sessions(types.SessionSearchRequest(session_id=sessions[0])).result()
    assert (page.sessions[0].display_name, page.sessions[0].checkpoints_count) == ("Nightly run one", 0)


def test_a_finished_session_has_its_reason_and_detail(raw_client: RawClient) -> None:
    session = raw_client.post("create_session", tags=[], sdk_version="test", display_name="to end").json()["session_id"]
    finished = raw_client.post(f"sessions/{session}/finish", reason={"type": "errored"}, detail="out of patience")
    assert finished.status_code == 204

    def found(**status: Any) -> list[Any]:
        answer = raw_client.post("sessions/search", session_id=session, statuses=[status])
        return list(answer.json()["sessions"])

    (one,) = found(type="client_finished", reasons=["errored"])
    assert one["status"]["detail"] == "out of patience"
    assert found(type="client_finished", reasons=["success"]) == found(type="active") == []
    refused = raw_client.post("sessions/search", statuses=[{"type": "lost"}], session_id=session)
    assert (refused.status_code, "client_finished" in refused.json()["detail"]) == (400, True)
    assert raw_client.post("sessions/search", limit=0).status_code == 400
