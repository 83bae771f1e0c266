"""Runs Sample commands: selects the network of each, and generates those of one network together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from tinkerbell_core.errors import Problem, TinkerbellError
from tinkerbell_core.types import SampleOutput
from tinkerbell_server.commands import CallContext, Sample, SampleResult
from tinkerbell_server.engines.torch.device_lock import DeviceLock
from tinkerbell_server.engines.torch.generate import Generated, generate
from tinkerbell_server.engines.torch.models import Models
from tinkerbell_server.engines.torch.network import Network
from tinkerbell_server.engines.torch.sample_text import Tokenizer


class Sampler:
    """Samples from trained models, from saved ones and from the base model."""

    def __init__(self, models: Models, tokenizer: Tokenizer, device_lock: DeviceLock) -> None:
        """tokenizer: used for stop strings and for the text of the samples. device_lock: lent between two tokens."""
        self._models, self._tokenizer, self._device_lock = models, tokenizer, device_lock

    def sample(self, command: Sample, context: CallContext) -> SampleOutput:
        """Raises UnknownModel, BadCheckpoint."""
        (result,) = self.sample_together([command], context)
        if result.problem is not None:
            raise result.problem.error()
        assert result.output is not None
        return result.output

    def sample_together(self, commands: Sequence[Sample], context: CallContext) -> list[SampleResult]:
        """The output or the error of each command; an error of one command does not affect the others."""
        results: dict[int, SampleResult] = {}
        by_network: dict[tuple[str | None, str | None], list[int]] = {}
        for part, command in enumerate(commands):
            by_network.setdefault((command.path, command.model_id), []).append(part)
        for parts in by_network.values():
            own = {part: commands[part] for part in parts}
            try:
                generated = self._generate(own, context)
            except TinkerbellError as error:
                results.update(dict.fromkeys(parts, SampleResult(problem=Problem.of(error))))
                continue
            for part, result in generated.items():
                output = SampleOutput(
                    model_id=commands[part].model_id,
                    prompt_tokens=len(commands[part].prompt),
                    sequences=result.sequences,
                    prompt=result.prompt,
                )
                results[part] = SampleResult(output=output)
        return [results[part] for part in range(len(commands))]

    def _generate(self, commands: Mapping[int, Sample], context: CallContext) -> dict[int, Generated]:
        """The samples of the commands, which are all of one network."""
        first = next(iter(commands.values()))
        with self._models.for_samples(None if first.path is None else Path(first.path), first.model_id) as activate:

            def activate_for_samples() -> Network:
                network = activate()
                network.mode(train=False)
                return network

            pause = partial(self._device_lock.between_items, activate_for_samples)
            return generate(activate_for_samples(), self._tokenizer, commands, context, pause)
