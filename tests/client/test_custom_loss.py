"""The decorator uploads a loss, and refuses one that cannot be sent."""

from __future__ import annotations

import base64
import importlib.util
import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.client.conftest import Listener
from tinker_client import LossFnOutput, TinkerClient, custom_loss
from tinkerbell_core.decorator import loss
from tinkerbell_core.errors import BadLoss, BadUpload, UploadTooLarge
from tinkerbell_core.serialization import unpack
from tinkerbell_core.spec import Provenance
from tinkerbell_core.types import LossDescription


def accepted(name: str, digest: str = "0" * 64) -> LossDescription:
    return LossDescription(
        id=f"upload:{name}@{digest[:12]}",
        name=name,
        summary="",
        inputs=(),
        optional_inputs=(),
        hyperparameters=(),
        coupling="batch",
        group_size=1,
        finite=(),
        provenance=Provenance("upload"),
        digest=digest,
    )


@pytest.fixture(autouse=True)
def _accepts(listener: Listener) -> None:
    listener.answers["/register_custom_loss"] = (200, accepted("mine"))


def uploaded(listener: Listener) -> dict[str, Any]:
    ((_, body),) = listener.sent("/register_custom_loss")
    message: dict[str, Any] = json.loads(body)
    return message


def test_the_decorator_returns_the_function_unchanged(client: TinkerClient) -> None:
    def mine(model_outputs: Any, loss_fn_inputs: Any, attention_mask: Any) -> LossFnOutput:
        """Mine."""
        return LossFnOutput(model_outputs.sum())

    decorated = custom_loss(client)(mine)
    assert decorated is mine
    assert not vars(mine)
    assert decorated(torch.ones(2), {}, None).loss == 2


def test_an_upload_describes_its_loss(listener: Listener, client: TinkerClient) -> None:
    @custom_loss(client, name="mine", coupling="sequence", group_size=2, example_inputs={"reward": torch.ones(4)})
    def my_loss(model_outputs: Any, loss_fn_inputs: Any, attention_mask: Any, *, beta: float = 0.1) -> LossFnOutput:
        return LossFnOutput(model_outputs.sum() * beta)

    upload = uploaded(listener)
    assert (upload["name"], upload["coupling"], upload["group_size"]) == ("mine", "sequence", 2)
    assert upload["magic"] == importlib.util.MAGIC_NUMBER.hex()
    assert upload["source"].startswith("def my_loss(")
    assert upload["filename"] == __file__
    assert upload["example_inputs"]["reward"]["shape"] == [4]
    assert upload["kind"] == "source"
    sent = unpack(base64.b64decode(upload["payload"]))
    assert sent(torch.ones(2), {}, None, beta=3).loss == 6


def test_an_unchanged_loss_is_not_sent_again(listener: Listener, client: TinkerClient) -> None:
    def mine(model_outputs: Any, loss_fn_inputs: Any, attention_mask: Any) -> LossFnOutput:
        return LossFnOutput(model_outputs.sum())

    known = accepted("mine", loss(mine).digest)
    listing = {"available_loss_functions": ["mine"], "descriptions": {}, "losses": [known], "plugins": []}
    listener.answers["/list_loss_functions"] = (200, listing)
    custom_loss(client)(mine)
    assert not listener.sent("/register_custom_loss")
    custom_loss(client, coupling="sequence")(mine)
    assert len(listener.sent("/register_custom_loss")) == 1


@pytest.mark.parametrize(("via", "load"), [("source", "unpack"), ("cloudpickle", "pickle.loads")])
def test_a_loss_in_a_local_module_is_sent_with_its_helpers(
    listener: Listener, client: TinkerClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, via: Any, load: str
) -> None:
    (tmp_path / "my_maths.py").write_text("def twice(x):\n    return x * 2\n")
    (tmp_path / "my_losses.py").write_text(
        "from my_maths import twice\nfrom tinker_client import LossFnOutput\n\n"
        "def mine(model_outputs, loss_fn_inputs, attention_mask):\n"
        "    return LossFnOutput(twice(model_outputs).sum())\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    import my_losses  # type: ignore[import-not-found]

    custom_loss(client, via=via)(my_losses.mine)
    (tmp_path / "payload").write_text(uploaded(listener)["payload"])
    program = (
        "import base64, pickle, torch\n"
        "from tinkerbell_core.serialization import unpack\n"
        f"fn = {load}(base64.b64decode(open({str(tmp_path / 'payload')!r}).read()))\n"
        "assert fn(torch.ones(3), {}, None).loss == 6\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
    for module in ("my_losses", "my_maths"):
        monkeypatch.delitem(sys.modules, module)


def test_a_loss_that_uses_the_client_is_refused(listener: Listener, client: TinkerClient) -> None:
    with pytest.raises(BadUpload, match=r"loss 'mine' uses 'client', a TinkerClient, but a loss runs on the server"):

        @custom_loss(client)
        def mine(model_outputs: Any, loss_fn_inputs: Any, attention_mask: Any) -> LossFnOutput:
            client.healthz()
            return LossFnOutput(model_outputs.sum())

    assert not listener.requests


def test_a_loss_with_a_helper_that_uses_the_backend_is_refused(client: TinkerClient) -> None:
    hf_backend = client.hf_backend

    def reward() -> float:
        return float(hf_backend.sample("x").prompt_tokens)

    with pytest.raises(BadUpload, match="uses 'hf_backend', a HFBackend"):

        @custom_loss(client)
        def mine(model_outputs: Any, loss_fn_inputs: Any, attention_mask: Any) -> LossFnOutput:
            return LossFnOutput(model_outputs.sum() * reward())


def test_a_client_inside_a_captured_value_is_refused(client: TinkerClient) -> None:
    settings = {"client": client}
    with pytest.raises(BadUpload, match="do not use the client inside a loss"):

        @custom_loss(client)
        def mine(model_outputs: Any, loss_fn_inputs: Any, attention_mask: Any) -> LossFnOutput:
            return LossFnOutput(model_outputs.sum() * len(settings))


def test_a_payload_with_the_api_key_is_refused(listener: Listener, client: TinkerClient) -> None:
    headers = {"X-API-Key": "tml-1-very-secret"}
    with pytest.raises(BadUpload, match="contains your API key"):

        @custom_loss(client)
        def mine(model_outputs: Any, loss_fn_inputs: Any, attention_mask: Any) -> LossFnOutput:
            return LossFnOutput(model_outputs.sum() * len(headers))

    assert not listener.sent("/register_custom_loss")


def test_the_error_for_a_too_large_payload_names_its_largest_variable(client: TinkerClient) -> None:
    teacher, small = torch.zeros(300_000), torch.zeros(3)
    with pytest.raises(UploadTooLarge, match=r"'teacher' \(1,2.* pass the data through loss_fn_inputs"):

        @custom_loss(client)
        def mine(model_outputs: Any, loss_fn_inputs: Any, attention_mask: Any) -> LossFnOutput:
            return LossFnOutput(model_outputs.sum() + teacher.sum() + small.sum())


def test_a_variable_that_cannot_be_pickled_is_named(client: TinkerClient) -> None:
    lock = threading.Lock()
    with pytest.raises(BadUpload, match=r"loss 'mine' captures 'lock' \(lock\), which cannot be sent"):

        @custom_loss(client)
        def mine(model_outputs: Any, loss_fn_inputs: Any, attention_mask: Any) -> LossFnOutput:
            with lock:
                return LossFnOutput(model_outputs.sum())


def test_the_error_for_missing_cloudpickle_says_how_to_install_it(
    client: TinkerClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cloudpickle", None)
    with pytest.raises(BadUpload, match="pip install cloudpickle"):

        @custom_loss(client, via="cloudpickle")
        def mine(model_outputs: Any, loss_fn_inputs: Any, attention_mask: Any) -> LossFnOutput:
            return LossFnOutput(model_outputs.sum())


def test_a_loss_without_source_is_sent_as_cloudpickle(listener: Listener, client: TinkerClient) -> None:
    scope: dict[str, Any] = {"LossFnOutput": LossFnOutput}
    exec("def mine(x, i, a): return LossFnOutput(x.sum())", scope)
    custom_loss(client)(scope["mine"])
    assert uploaded(listener).get("kind", "cloudpickle") == "cloudpickle"


def test_a_loss_that_source_would_change_is_sent_as_cloudpickle(listener: Listener, client: TinkerClient) -> None:
    def mine(model_outputs: Any, loss_fn_inputs: Any, attention_mask: Any) -> LossFnOutput:
        return LossFnOutput(model_outputs.sum() * (2 if mine.__module__ == __name__ else 3))

    custom_loss(client)(mine)
    assert uploaded(listener).get("kind", "cloudpickle") == "cloudpickle"


def test_via_source_gives_the_reason_if_it_fails(client: TinkerClient) -> None:
    lock = threading.Lock()
    with pytest.raises(BadUpload, match=r"loss 'mine' cannot be sent as source: 'lock' is a lock"):

        @custom_loss(client, via="source")
        def mine(model_outputs: Any, loss_fn_inputs: Any, attention_mask: Any) -> LossFnOutput:
            with lock:
                return LossFnOutput(model_outputs.sum())


def test_a_function_that_is_not_a_loss_is_refused_before_the_upload(client: TinkerClient) -> None:
    with pytest.raises(BadLoss, match="takes 1 positional arguments"):
        custom_loss(client)(lambda x: x)


def test_the_error_of_the_trial_is_raised_at_the_definition(listener: Listener, client: TinkerClient) -> None:
    problem = {"kind": "BadLoss", "message": "loss 'mine' raised KeyError", "traceback": "line 3, in mine"}
    listener.answers["/register_custom_loss"] = (422, {"problem": problem})
    with pytest.raises(BadLoss, match="line 3, in mine"):

        @custom_loss(client)
        def mine(model_outputs: Any, loss_fn_inputs: Any, attention_mask: Any) -> LossFnOutput:
            return LossFnOutput(model_outputs.sum())
