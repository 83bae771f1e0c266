"""Training runs of Tinker clients: creates their models and submits their numbered requests."""

from __future__ import annotations

import hashlib
import time

from tinkerbell_core.errors import BadHyperparameter, BadRequest, TinkerbellError, UnknownLoss
from tinkerbell_core.registry import resolve
from tinkerbell_core.types import CreateModelRequest, ForwardRequest, LossDescription, OptimStepRequest
from tinkerbell_server.access.tenants import Caller, visible
from tinkerbell_server.api.tinker import decode, protocol
from tinkerbell_server.api.tinker.chunks import Chunk, couples_rows, forward_request, take_groups
from tinkerbell_server.api.tinker.custom_losses import CustomLosses
from tinkerbell_server.api.tinker.requests import TinkerRequests
from tinkerbell_server.api.tinker.sequencer import Sequencer
from tinkerbell_server.api.tinker.store import Run, StoredRequest
from tinkerbell_server.commands import EngineDescription
from tinkerbell_server.service.submissions import Submission

CUSTOM = "custom"
"""The protocol's name for every loss of create_custom_loss; `loss_id` in the config names one."""

ALPHA = 32.0
"""The protocol has no alpha; this is the usual value."""


class Training:
    """Every run of one server."""

    def __init__(self, requests: TinkerRequests, sequencer: Sequencer, losses: CustomLosses) -> None:
        self._requests, self._sequencer, self._losses = requests, sequencer, losses

    async def create(self, caller: Caller, body: bytes) -> tuple[str, str]:
        """create_model: the request's id and the model's."""
        requests, tenant = self._requests, caller.tenant
        sent = protocol.parse(body, protocol.CreateModel)
        engine = await requests.engine()
        session = requests.session(tenant, sent.session_id)
        requests.base.check(sent.base_model)
        check_optimizer(sent.optimizer_config)
        model_id = model_id_of(session.id, sent.model_seq_id)
        lora = sent.lora_config or protocol.LoraConfig()
        seed = seed_of(model_id) if lora.seed is None else lora.seed
        content = CreateModelRequest(
            model_id=model_id,
            rank=lora.rank,
            alpha=ALPHA,
            target_modules=target_modules(lora, engine),
            seed=seed,
        )
        run = Run(
            id=model_id,
            tenant=tenant,
            parent=session.id,
            base_model=requests.base.name,
            rank=lora.rank,
            seed=seed,
            train_attn=lora.train_attn,
            train_mlp=lora.train_mlp,
            train_unembed=lora.train_unembed,
            user_metadata=sent.user_metadata,
            last_request=time.time(),
        )
        submission = Submission(
            caller=caller,
            kind="create_model",
            content=content,
            key=f"{model_id}/create",
            action="create_model",
            subject=model_id,
            on_accept=lambda _: requests.store.put(run),
        )
        record = StoredRequest(id="", tenant=tenant, parent=model_id, kind="create_model")
        return await requests.submit(submission, body, record), model_id

    async def forward(self, caller: Caller, call: decode.ForwardCall, body: bytes) -> tuple[str, str]:
        """forward and forward_backward: the request's id and the model's."""
        engine = await self._requests.engine()
        run = self._requests.run(caller.tenant, call.model_id)
        kind = "forward_backward" if call.backward else "forward"
        # a graph has one K: it reads no weights that would mark some targets as padding
        widths = None if call.loss_fn == CUSTOM else decode.same_widths(call.data)
        sent_config = call.config
        content: ForwardRequest | None = None
        loss: LossDescription | None = None
        chunk: Chunk | None = None
        problem: TinkerbellError | None = None
        try:
            loss, call = self._find_loss(run, call, engine)
            if call.loss_fn != CUSTOM:
                if couples_rows(loss, call):  # a graph sees one row at a time
                    chunk = Chunk(run, call, loss, take_groups(loss, call))
                decode.check_known_inputs(loss, call.data)
            content = forward_request(run, [call], loss)
        except TinkerbellError as error:
            problem = error
        custom = call.loss_fn == CUSTOM
        submission = Submission(
            caller=caller,
            kind=kind,
            content=content,
            problem=problem,
            loss=loss,
            action=kind if custom else None,
            subject=str(sent_config.get("loss_id")) if custom else None,
        )
        rows = len(call.data)
        record = StoredRequest(id="", tenant=caller.tenant, parent=run.id, kind=kind, rows=rows, widths=widths)
        return await self._sequencer.submit(run, call.seq_id, submission, body, record, chunk), run.id

    async def optim_step(self, caller: Caller, body: bytes) -> tuple[str, str]:
        """optim_step: the request's id and the model's."""
        sent = protocol.parse(body, protocol.OptimStep)
        await self._requests.engine()
        run = self._requests.run(caller.tenant, sent.model_id)
        adam = sent.adam_params or protocol.AdamParams()
        content = OptimStepRequest(
            model_id=run.id,
            learning_rate=adam.learning_rate,
            betas=(adam.beta1, adam.beta2),
            eps=adam.eps,
            weight_decay=adam.weight_decay,
            grad_clip_norm=adam.grad_clip_norm,
        )
        problem: TinkerbellError | None = None
        try:
            check_optimizer(sent.optimizer_params)
        except BadHyperparameter as error:
            problem = error
        submission = Submission(caller=caller, kind="optim_step", content=None if problem else content, problem=problem)
        record = StoredRequest(id="", tenant=caller.tenant, parent=run.id, kind="optim_step")
        return await self._sequencer.submit(run, sent.seq_id, submission, body, record), run.id

    def _find_loss(
        self, run: Run, call: decode.ForwardCall, engine: EngineDescription
    ) -> tuple[LossDescription, decode.ForwardCall]:
        """The loss of a call, and the call in the form that the loss reads. Raises UnknownLoss, AmbiguousLoss."""
        if call.loss_fn == CUSTOM:
            return self._losses.called(run, call, engine)
        return resolve(served_name(call.loss_fn), visible(run.tenant, engine.losses)), call


def model_id_of(session_id: str, model_seq_id: int) -> str:
    """The id of a session's model, which the client computes in the same way. Raises BadRequest."""
    if model_seq_id < 0:
        raise BadRequest(f"model_seq_id is {model_seq_id}, but models of a session are numbered from 0")
    return f"{session_id}:train:{model_seq_id}"


def seed_of(model_id: str) -> int:
    """The seed of a model that is created without one: different for each model, equal if a request is repeated."""
    return int.from_bytes(hashlib.sha256(model_id.encode()).digest()[:7])


def target_modules(lora: protocol.LoraConfig, engine: EngineDescription) -> list[str]:
    """The linear layers of the parts that are trained. Raises BadHyperparameter if no part is."""
    parts = {"attention": lora.train_attn, "mlp": lora.train_mlp, "unembed": lora.train_unembed}
    modules = sorted({name for part, wanted in parts.items() if wanted for name in engine.layers.get(part, [])})
    if not modules:
        raise BadHyperparameter(
            "lora_config trains nothing: of train_attn, train_mlp and train_unembed at least one must be true"
        )
    return modules


def served_name(loss_fn: str) -> str:
    """This server's name of a loss of the protocol. Raises UnknownLoss for a loss of the hosted service only.

    The protocol's gspo is the paper's token form, summed; a plugin may have another loss of this name.
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
    """Raise BadHyperparameter for an optimizer other than AdamW."""
    kind = (sent or {}).get("type", "adamw")
    if kind not in ("adamw", "adam"):
        raise BadHyperparameter(
            f"optimizer {str(kind)[:60]!r} is not on this server, which has adamw: leave optimizer_config out and pass "
            "AdamParams to optim_step"
        )
