"""Training runs of Tinker clients: made, stepped and told of. Each run's requests are run by their seq_id."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import msgspec

from tinkerbell_core.errors import BadHyperparameter, BadRequest, TinkerbellError, UnknownLoss
from tinkerbell_core.registry import resolve
from tinkerbell_core.types import CreateModelRequest, ForwardOutput, ForwardRequest, LossDescription, OptimStepRequest
from tinkerbell_server.admission import Request
from tinkerbell_server.engines.base import EngineDescription
from tinkerbell_server.engines.wire import AnyCommand
from tinkerbell_server.ranges import create_spec
from tinkerbell_server.tenancy import qualified, visible
from tinkerbell_server.tinker import bodies, datums, results
from tinkerbell_server.tinker.desk import Desk
from tinkerbell_server.tinker.order import Line
from tinkerbell_server.tinker.records import Run

ALPHA = 32.0
"""The wire has no alpha; this is the one everybody uses."""


@dataclass(frozen=True, slots=True)
class Waiting:
    """A request in its line. start: queues it, or fails its future. call: of a forward, for chunks of one call."""

    request_id: str
    start: Callable[[], None]
    call: Joinable | None = None


@dataclass(frozen=True, slots=True)
class Joinable:
    """A chunk of a loss that must see the whole batch."""

    run: Run
    call: datums.ForwardCall
    loss: LossDescription
    engine: EngineDescription

    def continues(self, other: Joinable | None) -> bool:
        return (
            other is not None
            and (self.loss.id, self.call.backward) == (other.loss.id, other.call.backward)
            and self.call.config == other.call.config
        )


class Training:
    """Every run of one server."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._lines: dict[str, Line[Waiting]] = {}

    def close(self) -> None:
        for line in self._lines.values():
            line.close()

    async def create(self, tenant: str, body: bytes) -> tuple[str, str]:
        """create_model: the request's id and the model's."""
        desk = self._desk
        sent = bodies.parse(body, bodies.CreateModel)
        engine = await desk.engine()
        session = desk.session(tenant, sent.session_id)
        desk.base.check(sent.base_model)
        check_optimizer(sent.optimizer_config)
        model_id = model_id_of(session.id, sent.model_seq_id)
        key = f"{model_id}/create"
        repeated = desk.repeated(tenant, key, "create_model", body)
        if repeated is not None:
            return repeated, model_id
        lora = sent.lora_config or bodies.LoraConfig()
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
            base_model=desk.base.name,
            rank=lora.rank,
            seed=lora.seed or 0,
            train_attn=lora.train_attn,
            train_mlp=lora.train_mlp,
            train_unembed=lora.train_unembed,
            user_metadata=sent.user_metadata,
            last_request=time.time(),
        )
        command = desk.command(tenant, spec, "create_model", engine)
        desk.records.put(run)
        request_id = desk.accept(tenant, "create_model", key, body, parent=model_id)
        desk.queue(tenant, request_id, "create_model", run.model_id, command)
        return request_id, model_id

    async def forward(self, tenant: str, call: datums.ForwardCall, body: bytes) -> tuple[str, str]:
        """forward and forward_backward: the request's id and the model's."""
        engine = await self._desk.engine()
        kind = "forward_backward" if call.backward else "forward"
        widths = datums.same_widths(call.data)

        def make() -> ForwardRequest:
            loss = resolve(served_name(call.loss_fn, call.config), visible(tenant, engine.losses))
            datums.check_known_inputs(loss, call.data)
            return _forward_request(run, [call], loss)

        run, key = self._numbered(tenant, call.model_id, call.seq_id)
        joinable = self._joinable(run, call, engine)
        return self._take(run, key, call.seq_id, kind, body, make, engine, joinable, rows=len(call.data), widths=widths)

    async def optim_step(self, tenant: str, body: bytes) -> tuple[str, str]:
        sent = bodies.parse(body, bodies.OptimStep)
        engine = await self._desk.engine()

        def make() -> OptimStepRequest:
            check_optimizer(sent.optimizer_params)
            adam = sent.adam_params or bodies.AdamParams()
            return OptimStepRequest(
                model_id=run.model_id,
                learning_rate=adam.learning_rate,
                betas=(adam.beta1, adam.beta2),
                eps=adam.eps,
                weight_decay=adam.weight_decay,
                grad_clip_norm=adam.grad_clip_norm,
            )

        run, key = self._numbered(tenant, sent.model_id, sent.seq_id)
        return self._take(run, key, sent.seq_id, "optim_step", body, make, engine)

    def take_command(
        self,
        run: Run,
        seq: int | None,
        kind: str,
        body: bytes,
        start: Callable[[str], None],
        **details: object,
    ) -> str:
        """Another numbered request of a run, such as a save; its id. start: given the id when its turn has come."""
        _, key = self._numbered(run.tenant, run.id, seq)
        request_id = self._desk.repeated(run.tenant, key, kind, body) if key else None
        if request_id is not None:
            return request_id
        self._check_turn(run, seq)
        request_id = self._desk.accept(run.tenant, kind, key or _own_key(run), body, parent=run.id, **details)
        self._wait(run, seq, Waiting(request_id, lambda: self._guarded(request_id, lambda: start(request_id))))
        return request_id

    def _take(
        self,
        run: Run,
        key: str | None,
        seq: int | None,
        kind: str,
        body: bytes,
        make: Callable[[], Request],
        engine: EngineDescription,
        joinable: Joinable | None = None,
        **details: object,
    ) -> tuple[str, str]:
        desk = self._desk
        repeated = desk.repeated(run.tenant, key, kind, body) if key else None
        if repeated is not None:
            return repeated, run.id
        self._check_turn(run, seq)
        request_id = desk.accept(run.tenant, kind, key or _own_key(run), body, parent=run.id, **details)

        def start() -> None:
            request = make()
            desk.queue(run.tenant, request_id, kind, run.model_id, self._command(run.tenant, request, kind, engine))

        self._wait(run, seq, Waiting(request_id, lambda: self._guarded(request_id, start), joinable))
        return request_id, run.id

    def _command(self, tenant: str, request: Request, kind: str, engine: EngineDescription) -> Callable[[], AnyCommand]:
        command = self._desk.command(tenant, request, kind, engine)
        self._desk.service.admission.tell_notice(request, engine)
        return command

    def _guarded(self, request_id: str, start: Callable[[], None]) -> None:
        try:
            start()
        except TinkerbellError as error:
            self._desk.fail(request_id, error)

    def _numbered(self, tenant: str, model_id: str, seq: int | None) -> tuple[Run, str | None]:
        run = self._desk.run(tenant, model_id)
        if seq is not None and seq < 1:
            raise BadRequest(f"seq_id is {seq}, but requests of a model are numbered from 1")
        return run, None if seq is None else f"{run.id}/{seq}"

    def _line(self, run: Run) -> Line[Waiting]:
        if run.id not in self._lines:
            self._lines[run.id] = Line(run.id, run.next_seq, self._release)
        return self._lines[run.id]

    def _check_turn(self, run: Run, seq: int | None) -> None:
        line = self._line(run)
        if seq is not None and line.late(seq):
            raise BadRequest(
                f"seq_id {seq} of model {run.id!r} comes too late: the model is at {line.next} already "
                "(a request that does not arrive is given up after a while)"
            )

    def _wait(self, run: Run, seq: int | None, waiting: Waiting) -> None:
        if seq is None:
            waiting.start()
            return
        line = self._line(run)
        before = line.next
        line.arrive(seq, waiting)
        if line.next != before:
            self._desk.touch(run.id, next_seq=line.next)

    def _release(self, ready: list[Waiting]) -> None:
        while ready:
            first = ready[0]
            count = 1
            if first.call is not None:
                while count < len(ready) and first.call.continues(ready[count].call):
                    count += 1
            if count == 1:
                first.start()
            else:
                self._run_joined(ready[:count])
            ready = ready[count:]

    def _run_joined(self, chunks: list[Waiting]) -> None:
        """Chunks of one call of a loss that couples its rows, run as the one call they are."""
        joined = [chunk.call for chunk in chunks if chunk.call is not None]
        calls = [chunk.call for chunk in joined]
        first = chunks[0].request_id

        def finish(result: bytes) -> None:
            output = msgspec.msgpack.decode(result, type=ForwardOutput)
            parts = results.split(output, [len(call.data) for call in calls])
            for chunk, part in zip(chunks, parts, strict=True):
                self._desk.finish(chunk.request_id, msgspec.msgpack.encode(part))

        def fail(error: TinkerbellError) -> None:
            for chunk in chunks:
                self._desk.fail(chunk.request_id, error)

        try:
            kind = "forward_backward" if calls[0].backward else "forward"
            run = joined[0].run
            request = _forward_request(run, calls, joined[0].loss)
            command = self._command(run.tenant, request, kind, joined[0].engine)
        except TinkerbellError as error:
            fail(error)
            return
        self._desk.queue_many(run.tenant, first, kind, request.model_id, command, finish, fail)

    def _joinable(self, run: Run, call: datums.ForwardCall, engine: EngineDescription) -> Joinable | None:
        try:
            loss = resolve(served_name(call.loss_fn, call.config), visible(run.tenant, engine.losses))
        except BadRequest:
            return None  # said when its turn comes
        coupled = loss.coupling == "batch" or loss.group_size > 1 or call.config.get("aggregation", "sum") != "sum"
        return Joinable(run, call, loss, engine) if coupled else None


def model_id_of(session_id: str, model_seq_id: int) -> str:
    """What the client, too, calls a session's model. Raises BadRequest."""
    if model_seq_id < 0:
        raise BadRequest(f"model_seq_id is {model_seq_id}, but models of a session are numbered from 0")
    return f"{session_id}:train:{model_seq_id}"


def target_modules(lora: bodies.LoraConfig, engine: EngineDescription) -> list[str]:
    """The linear layers of the parts that are trained. Raises BadHyperparameter where there are none."""
    parts = {"attention": lora.train_attn, "mlp": lora.train_mlp, "unembed": lora.train_unembed}
    modules = sorted({name for part, wanted in parts.items() if wanted for name in engine.layers.get(part, [])})
    if not modules:
        raise BadHyperparameter(
            "lora_config trains nothing: of train_attn, train_mlp and train_unembed at least one must be true"
        )
    return modules


def served_name(loss_fn: str, config: Mapping[str, float | str]) -> str:
    """The name here of a loss on the wire. Raises UnknownLoss for one of the hosted service that nobody else can have.

    What the wire calls gspo is the paper's token form, summed; a plugin may have a gspo of its own beside it.
    """
    if loss_fn == "gspo":
        return "tinkerbell-core:gspo_token"
    if loss_fn == "custom":
        raise UnknownLoss(
            f"no custom loss {str(config.get('loss_id'))[:80]!r} on this server: it runs where the client is, by "
            "forward_backward_custom, or is uploaded with tinker_client's custom_loss and called by its name"
        )
    if loss_fn == "stable_reinforce":
        raise UnknownLoss(
            "stable_reinforce is not on this server (its formula is not public): pass loss_fn='importance_sampling', "
            "or 'ppo' or 'cispo' for a clipped ratio; they take the same target_tokens, logprobs and advantages"
        )
    return loss_fn


def check_optimizer(sent: dict[str, bodies.Any_] | None) -> None:
    """Raise BadHyperparameter for any optimizer but AdamW."""
    kind = (sent or {}).get("type", "adamw")
    if kind not in ("adamw", "adam"):
        raise BadHyperparameter(
            f"optimizer {str(kind)[:60]!r} is not on this server, which has adamw: leave optimizer_config out and pass "
            "AdamParams to optim_step"
        )


def _forward_request(run: Run, calls: list[datums.ForwardCall], loss: LossDescription) -> ForwardRequest:
    return ForwardRequest(
        model_id=run.model_id,
        data=[datum for call in calls for datum in call.data],
        loss_fn=loss.id,
        loss_fn_config={**datums.config_of(loss, calls[0].config)},
    )


def _own_key(run: Run) -> str:
    return f"{run.id}/at/{time.time_ns()}"
