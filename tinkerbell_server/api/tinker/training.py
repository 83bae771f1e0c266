"""Training runs of Tinker clients: made, and stepped by requests that each say their place in the run's line."""

from __future__ import annotations

import time
from collections.abc import Callable

from tinkerbell_core.errors import BadHyperparameter, BadRequest, UnknownLoss
from tinkerbell_core.registry import resolve
from tinkerbell_core.types import CreateModelRequest, ForwardRequest, OptimStepRequest
from tinkerbell_server.access.tenants import qualified, visible
from tinkerbell_server.api.tinker import decode, protocol
from tinkerbell_server.api.tinker.chunks import Chunk, couples, forward_request, take_groups
from tinkerbell_server.api.tinker.custom_losses import CustomLosses
from tinkerbell_server.api.tinker.requests import TinkerRequests
from tinkerbell_server.api.tinker.sequencer import Sequencer
from tinkerbell_server.api.tinker.store import Run
from tinkerbell_server.calls.settings import create_spec
from tinkerbell_server.commands import EngineDescription
from tinkerbell_server.service.intake import Request

CUSTOM = "custom"
"""What the wire calls every loss of create_custom_loss; `loss_id` in the config says which."""

ALPHA = 32.0
"""The wire has no alpha; this is the one everybody uses."""


class Training:
    """Every run of one server."""

    def __init__(self, requests: TinkerRequests, sequencer: Sequencer, losses: CustomLosses) -> None:
        self._requests, self._sequencer, self._losses = requests, sequencer, losses

    async def create(self, tenant: str, body: bytes) -> tuple[str, str]:
        """create_model: the request's id and the model's."""
        requests = self._requests
        sent = protocol.parse(body, protocol.CreateModel)
        engine = await requests.engine()
        session = requests.session(tenant, sent.session_id)
        requests.base.check(sent.base_model)
        check_optimizer(sent.optimizer_config)
        model_id = model_id_of(session.id, sent.model_seq_id)
        key = f"{model_id}/create"
        repeated = requests.repeated(tenant, key, "create_model", body)
        if repeated is not None:
            return repeated, model_id
        lora = sent.lora_config or protocol.LoraConfig()
        spec = create_spec(
            CreateModelRequest(
                model_id=qualified(tenant, model_id),
                rank=lora.rank,
                alpha=ALPHA,
                target_modules=target_modules(lora, engine),
                seed=lora.seed or 0,
            )
        )
        run = Run(
            id=model_id,
            tenant=tenant,
            parent=session.id,
            base_model=requests.base.name,
            rank=lora.rank,
            seed=lora.seed or 0,
            train_attn=lora.train_attn,
            train_mlp=lora.train_mlp,
            train_unembed=lora.train_unembed,
            user_metadata=sent.user_metadata,
            last_request=time.time(),
        )
        command = requests.command(tenant, spec, "create_model", engine)
        requests.store.put(run)
        request_id = requests.accept(tenant, "create_model", key, body, parent=model_id)
        requests.queue(tenant, request_id, "create_model", run.model_id, command)
        return request_id, model_id

    async def forward(self, tenant: str, call: decode.ForwardCall, body: bytes) -> tuple[str, str]:
        """forward and forward_backward: the request's id and the model's."""
        engine = await self._requests.engine()
        kind = "forward_backward" if call.backward else "forward"
        # a graph is for one K: it sees no weights that would tell it which targets are padding
        widths = None if call.loss_fn == CUSTOM else decode.same_widths(call.data)

        def make() -> ForwardRequest:
            if call.loss_fn == CUSTOM:
                loss, own = self._losses.called(run, call, engine)
                return forward_request(run, [own], loss)
            loss = resolve(served_name(call.loss_fn), visible(tenant, engine.losses))
            decode.check_known_inputs(loss, call.data)
            return forward_request(run, [call], loss)

        run = self._requests.run(tenant, call.model_id)
        chunk = self._chunk(run, call, engine)
        start = self._start(run, kind, make, engine)
        details = {"rows": len(call.data), "widths": widths}
        return self._sequencer.take(run, call.seq_id, kind, body, start, chunk, **details), run.id

    async def optim_step(self, tenant: str, body: bytes) -> tuple[str, str]:
        sent = protocol.parse(body, protocol.OptimStep)
        engine = await self._requests.engine()

        def make() -> OptimStepRequest:
            check_optimizer(sent.optimizer_params)
            adam = sent.adam_params or protocol.AdamParams()
            return OptimStepRequest(
                model_id=run.model_id,
                learning_rate=adam.learning_rate,
                betas=(adam.beta1, adam.beta2),
                eps=adam.eps,
                weight_decay=adam.weight_decay,
                grad_clip_norm=adam.grad_clip_norm,
            )

        run = self._requests.run(tenant, sent.model_id)
        start = self._start(run, "optim_step", make, engine)
        return self._sequencer.take(run, sent.seq_id, "optim_step", body, start), run.id

    def _start(
        self, run: Run, kind: str, make: Callable[[], Request], engine: EngineDescription
    ) -> Callable[[str], None]:
        """What a request does when its turn has come."""

        def start(request_id: str) -> None:
            command = self._sequencer.command(run.tenant, make(), kind, engine)
            self._requests.queue(run.tenant, request_id, kind, run.model_id, command)

        return start

    def _chunk(self, run: Run, call: decode.ForwardCall, engine: EngineDescription) -> Chunk | None:
        """The call as a chunk, where its loss couples rows. Raises BadData for a `group_id` that is none."""
        if call.loss_fn == CUSTOM:
            return None  # a graph sees one row at a time
        try:
            loss = resolve(served_name(call.loss_fn), visible(run.tenant, engine.losses))
        except BadRequest:
            return None  # raised when its turn comes
        return Chunk(run, call, loss, engine, take_groups(loss, call)) if couples(loss, call) else None


def model_id_of(session_id: str, model_seq_id: int) -> str:
    """What the client, too, calls a session's model. Raises BadRequest."""
    if model_seq_id < 0:
        raise BadRequest(f"model_seq_id is {model_seq_id}, but models of a session are numbered from 0")
    return f"{session_id}:train:{model_seq_id}"


def target_modules(lora: protocol.LoraConfig, engine: EngineDescription) -> list[str]:
    """The linear layers of the parts that are trained. Raises BadHyperparameter where there are none."""
    parts = {"attention": lora.train_attn, "mlp": lora.train_mlp, "unembed": lora.train_unembed}
    modules = sorted({name for part, wanted in parts.items() if wanted for name in engine.layers.get(part, [])})
    if not modules:
        raise BadHyperparameter(
            "lora_config trains nothing: of train_attn, train_mlp and train_unembed at least one must be true"
        )
    return modules


def served_name(loss_fn: str) -> str:
    """The name here of a loss on the wire. Raises UnknownLoss for one of the hosted service that nobody else can have.

    What the wire calls gspo is the paper's token form, summed; a plugin may have a gspo of its own beside it.
    """
    if loss_fn == "gspo":
        return "tinkerbell-core:gspo_token"
    if loss_fn == "stable_reinforce":
        raise UnknownLoss(
            "stable_reinforce is not on this server (its formula is not public): pass loss_fn='importance_sampling', "
            "or 'ppo' or 'cispo' for a clipped ratio; they take the same target_tokens, logprobs and advantages"
        )
    return loss_fn


def check_optimizer(sent: dict[str, protocol.Any_] | None) -> None:
    """Raise BadHyperparameter for any optimizer but AdamW."""
    kind = (sent or {}).get("type", "adamw")
    if kind not in ("adamw", "adam"):
        raise BadHyperparameter(
            f"optimizer {str(kind)[:60]!r} is not on this server, which has adamw: leave optimizer_config out and pass "
            "AdamParams to optim_step"
        )
