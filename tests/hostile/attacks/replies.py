"""Attacks that return invalid outputs, or that write invalid messages to the socket of the worker."""

import os
import struct
from typing import Any

Targets = dict[str, Any]


def returns_no_output(targets: Targets, logits: Any) -> Any:
    return "nothing", None


def returns_nan(targets: Targets, logits: Any) -> Any:
    return _output(logits.logsumexp(-1).sum() * float("nan"))


def returns_a_gradient_of_nan(targets: Targets, logits: Any) -> Any:
    zero = logits.logsumexp(-1).sum() * 0
    return _output(zero + (zero * 1e-30).sqrt())


def returns_no_graph(targets: Targets, logits: Any) -> Any:
    return _output(logits.logsumexp(-1).sum().detach())


def returns_a_vector(targets: Targets, logits: Any) -> Any:
    return _output(logits.logsumexp(-1).flatten())


def returns_a_meta_tensor(targets: Targets, logits: Any) -> Any:
    import torch

    return _output(torch.zeros((), device="meta", requires_grad=True))


def returns_many_diagnostics(targets: Targets, logits: Any) -> Any:
    return _output(logits.logsumexp(-1).sum(), diagnostics={str(n): 1.0 for n in range(100_000)})


def returns_a_diagnostic_with_a_long_name(targets: Targets, logits: Any) -> Any:
    return _output(logits.logsumexp(-1).sum(), diagnostics={"x" * (1 << 22): 1.0})


def returns_logprobs_of_another_shape(targets: Targets, logits: Any) -> Any:
    import torch

    return _output(logits.logsumexp(-1).sum(), logprobs=torch.zeros(1000, 1000))


def returns_a_tensor_with_patched_methods(targets: Targets, logits: Any) -> Any:
    import torch

    class Patched(torch.Tensor):
        def item(self) -> float:  # type: ignore[override]
            return float("nan")

        def isfinite(self) -> Any:
            return torch.ones(())

    return _output((logits.logsumexp(-1).sum() * float("inf")).as_subclass(Patched))


def rewrites_the_checks(targets: Targets, logits: Any) -> Any:
    import math

    import torch

    import tinkerbell_core.contract as contract

    math.isfinite = lambda _: True
    torch.isfinite = lambda x: torch.ones_like(x, dtype=torch.bool)
    for name in [name for name in vars(contract) if name.startswith("_check")]:
        setattr(contract, name, lambda *_: None)
    return _output(logits.logsumexp(-1).sum() * float("nan"))


def writes_garbage(targets: Targets, logits: Any) -> None:
    _write(os.urandom(4096))


def writes_a_pickle(targets: Targets, logits: Any) -> None:
    payload = b"cposix\nsystem\n(S'touch " + targets["canary"].encode() + b"/unpickled'\ntR."
    _write(struct.pack("<I", len(payload)) + payload)
    _write(payload)


def writes_an_endless_header(targets: Targets, logits: Any) -> None:
    _write(struct.pack("<I", 0xFFFFFFFF) + b"x" * 4096)


def announces_a_tensor_of_many_bytes(targets: Targets, logits: Any) -> None:
    _reply({"type": "Done", "loss": 1.0, "diagnostics": {}, "shared": []}, [["float32", [1 << 20, 1 << 20]]])


def announces_a_tensor_of_negative_size(targets: Targets, logits: Any) -> None:
    _reply({"type": "Done", "loss": 1.0, "diagnostics": {}, "shared": []}, [["float32", [-1, -1]]])


def announces_gradients_of_no_request(targets: Targets, logits: Any) -> None:
    _reply({"type": "Done", "loss": 1.0, "diagnostics": {}, "shared": [True] * 9}, [None] * 9)


def sends_a_loss_of_nan(targets: Targets, logits: Any) -> None:
    _reply({"type": "Done", "loss": float("nan"), "diagnostics": {}, "shared": []}, [None])


def reports_an_error_of_another_kind(targets: Targets, logits: Any) -> None:
    _reply({"type": "Failed", "kind": "EngineLost", "message": "the engine is lost", "traceback": None}, [])


def requests_rows_out_of_range(targets: Targets, logits: Any) -> None:
    _reply({"type": "LogitsRequest", "op": "full", "keep": False}, [["int64", [1]], None, None, None])
    _write(struct.pack("<q", -(1 << 40)))


def requests_more_rows_than_exist(targets: Targets, logits: Any) -> None:
    _reply({"type": "LogitsRequest", "op": "full", "keep": True}, [["int64", [1 << 40]], None, None, None])


def sends_requests_forever(targets: Targets, logits: Any) -> None:
    while True:
        logits.logsumexp(-1)


def sends_several_results(targets: Targets, logits: Any) -> Any:
    for _ in range(3):
        _reply({"type": "Done", "loss": 1.0, "diagnostics": {}, "shared": []}, [None])
    return _output(logits.logsumexp(-1).sum())


def closes_its_socket(targets: Targets, logits: Any) -> None:
    os.closerange(3, 64)


def searches_for_other_descriptors(targets: Targets, logits: Any) -> str:
    found = []
    for fd in range(3, 256):
        try:
            found.append((fd, os.fstat(fd).st_mode))
        except OSError:
            continue
    if len(found) > 1:
        return f"descriptors {found}"
    return ""


def patches_torch(targets: Targets, logits: Any) -> Any:
    import torch

    torch.logsumexp = torch.Tensor.logsumexp = lambda self, *_, **__: self.new_zeros(self.shape[:-1])
    torch.manual_seed = lambda _: None
    return _output(logits.sum())


def changes_its_inputs(targets: Targets, logits: Any) -> Any:
    with __import__("torch").no_grad():
        logits.detach().zero_()
    return _output(logits.sum())


def _output(loss: Any, logprobs: Any = None, diagnostics: Any = None) -> Any:
    from tinkerbell_core.output import LossFnOutput

    return LossFnOutput(loss, logprobs, diagnostics or {})


def _reply(message: dict[str, Any], tensors: list[Any]) -> None:
    import msgspec

    header = msgspec.msgpack.encode([msgspec.Raw(msgspec.msgpack.encode(message)), tensors, False])
    _write(struct.pack("<I", len(header)) + header)


def _write(data: bytes) -> None:
    """Write to every descriptor that accepts it; the socket to the engine is one of them."""
    for fd in range(3, 64):
        try:
            os.write(fd, data)
        except OSError:
            continue
