"""Training runs of Tinker clients: made, stepped and told of. Each run's requests are run by their seq_id."""

from __future__ import annotations

import time
from collections.abc import Callable
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
from tinkerbell_server.tinker.calls import MISSING, SEVERAL, TORN, Chunk, calls_of, couples, take_groups
from tinkerbell_server.tinker.desk import Desk
from tinkerbell_server.tinker.losses import CustomLosses
from tinkerbell_server.tinker.order import Line, Released
from tinkerbell_server.tinker.records import Run

CUSTOM = "custom"
"""What the wire calls every loss of create_custom_loss; `loss_id` in the config says which."""

ALPHA = 32.0
"""The wire has no alpha; this is the one everybody uses."""


@dataclass(frozen=True, slots=True)
class Waiting:
    """A request in its line. start: queues it, or fails its future. call: of a loss that couples its rows."""

    request_id: str
    start: Callable[[], None]
    call: Chunk | None = None


class Training:
    """Every run of one server."""

    def __init__(self, desk: Desk, losses: CustomLosses) -> None:
        self._desk, self._losses = desk, losses
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
        # a graph is for one K: it sees no weights that would tell it which targets are padding
        widths = None if call.loss_fn == CUSTOM else datums.same_widths(call.data)

        def make() -> ForwardRequest:
            if call.loss_fn == CUSTOM:
                loss, own = self._losses.called(run, call, engine)
                return _forward_request(run, [own], loss)
            loss = resolve(served_name(call.loss_fn), visible(tenant, engine.losses))
            datums.check_known_inputs(loss, call.data)
            return _forward_request(run, [call], loss)

        run, key = self._numbered(tenant, call.model_id, call.seq_id)
        chunk = self._chunk(run, call, engine)
        return self._take(run, key, call.seq_id, kind, body, make, engine, chunk, rows=len(call.data), widths=widths)

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

    def pass_over(self, tenant: str, model_id: str, seq: int | None) -> None:
        """A request was refused before it was accepted: those behind it need not wait for it."""
        run = self._desk.records.get(Run, model_id, tenant)
        if run is None or run.ended or seq is None or seq < 1:
            return
        if not self._line(run).late(seq):
            self._wait(run, seq, Waiting("", lambda: None))

    def _take(
        self,
        run: Run,
        key: str | None,
        seq: int | None,
        kind: str,
        body: bytes,
        make: Callable[[], Request],
        engine: EngineDescription,
        chunk: Chunk | None = None,
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

        self._wait(run, seq, Waiting(request_id, lambda: self._guarded(request_id, start), chunk))
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

    def _release(self, released: Released[Waiting]) -> None:
        ready = released.ready
        while ready:
            first = ready[0].call
            if first is None:
                ready[0].start()
                ready = ready[1:]
                continue
            count = 1
            while count < len(ready) and first.continues(ready[count].call):
                count += 1
            behind = released.ready[0] is not ready[0]
            doubt = SEVERAL if behind and count > 1 else MISSING if released.after_gap and not behind else None
            if count == len(ready) and any(first.continues(held.call) for held in released.held):
                doubt = doubt or TORN
            self._run_calls(ready[:count], doubt)
            ready = ready[count:]

    def _run_calls(self, chunks: list[Waiting], doubt: str | None) -> None:
        """Consecutive chunks of one loss that couples its rows, as the calls they are."""
        try:
            counts = calls_of([chunk.call for chunk in chunks if chunk.call is not None], doubt)
        except BadRequest as error:
            for chunk in chunks:
                self._desk.fail(chunk.request_id, error)
            return
        for count in counts:
            if count == 1:
                chunks[0].start()
            else:
                self._run_joined(chunks[:count])
            chunks = chunks[count:]

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

    def _chunk(self, run: Run, call: datums.ForwardCall, engine: EngineDescription) -> Chunk | None:
        """The call as a chunk, where its loss couples rows. Raises BadData for a `group_id` that is none."""
        if call.loss_fn == CUSTOM:
            return None  # a graph sees one row at a time
        try:
            loss = resolve(served_name(call.loss_fn), visible(run.tenant, engine.losses))
        except BadRequest:
            return None  # said when its turn comes
        return Chunk(run, call, loss, engine, take_groups(loss, call)) if couples(loss, call) else None


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
