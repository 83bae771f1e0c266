"""A client of the Tinker API that sends requests which the SDK does not send."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from tinkerbell_server.api.tinker import wire_pb2 as wire

PROTOBUF = {"content-type": "application/x-protobuf"}


class RawClient:
    """Sends single requests of the Tinker API, with chosen sequence ids."""

    def __init__(self, server: str, base: Path) -> None:
        self.http = httpx.Client(base_url=f"{server}/api/v1", timeout=60, trust_env=False)
        self.base = str(base)
        self.session = self.post("create_session", tags=[], sdk_version="test").json()["session_id"]
        self.models = 0

    def post(self, path: str, /, **body: Any) -> httpx.Response:
        return self.http.post(f"/{path}", json=body)

    def model(self) -> str:
        made = self.post(
            "create_model",
            session_id=self.session,
            model_seq_id=self.models,
            base_model=self.base,
            lora_config={"rank": 4, "seed": 1},
        )
        self.models += 1
        return str(self.done(made)["model_id"])

    def forward_backward(self, model: str, seq: int, loss_fn: str = "cross_entropy", **options: Any) -> httpx.Response:
        headers = PROTOBUF | options.pop("headers", {})
        content = options.pop("content", None) or message(model, seq, loss_fn, **options).SerializeToString()
        return self.http.post("/forward_backward", content=content, headers=headers)

    def sample(self, sampler: str, seq: int, **params: Any) -> httpx.Response:
        prompt = {"chunks": [{"type": "encoded_text", "tokens": [1, 2, 3]}]}
        sampling_params = {"max_tokens": 2, "seed": seq, **params}
        return self.post(
            "asample",
            sampling_session_id=sampler,
            seq_id=seq,
            num_samples=1,
            prompt=prompt,
            sampling_params=sampling_params,
        )

    def sampler(self, seq: int) -> str:
        made = self.post(
            "create_sampling_session", session_id=self.session, sampling_session_seq_id=seq, base_model=self.base
        )
        return str(made.json()["sampling_session_id"])

    def step(self, model: str, seq: int) -> httpx.Response:
        return self.post("optim_step", model_id=model, seq_id=seq, adam_params={"learning_rate": 1e-2})

    def result(self, future: httpx.Response) -> httpx.Response:
        assert future.status_code == 200, future.text
        return self.post("retrieve_future", request_id=future.json()["request_id"], allow_metadata_only=True)

    def done(self, future: httpx.Response) -> dict[str, Any]:
        answer = self.result(future)
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    def output(self, future: httpx.Response) -> wire.ForwardBackwardOutput:
        answer = self.result(future)
        assert answer.headers["content-type"] == "application/x-protobuf", answer.text
        return wire.ForwardBackwardOutput.FromString(answer.content)


def message(
    model: str,
    seq: int,
    loss_fn: str,
    rows: int = 1,
    first: int = 0,
    config: dict[str, float] | None = None,
    groups: Sequence[int] = (),
) -> Any:
    """A request with the rows `first` to `first + rows` of an endless text. groups: the `group_id` of each row."""
    sent = wire.ForwardBackwardRequest(model_id=model, seq_id=seq, loss_fn=loss_fn, loss_fn_config=config)
    for row in range(first, first + rows):
        datum = sent.data.add()
        datum.model_input.add().encoded_text.tokens = (np.arange(row, row + 6, dtype=np.int32) % 256).tobytes()
        target = datum.loss_fn_inputs["target_tokens"]
        target.dense, target.dtype = (np.arange(row + 1, row + 7) % 256).tobytes(), wire.DTYPE_INT64
        reference = datum.loss_fn_inputs["ref_logprobs"] if loss_fn == "dpo" else None
        if reference is not None:
            reference.dense, reference.dtype = np.full(6, -1, dtype=np.float32).tobytes(), wire.DTYPE_FLOAT32
        if groups:
            group = datum.loss_fn_inputs["group_id"]
            group.dense, group.dtype = np.int64(groups[row - first]).tobytes(), wire.DTYPE_INT64
            group.shape.append(1)
    return sent
