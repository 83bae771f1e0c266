"""Runs Sample commands: selects the network of each, and generates those of one network together."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tinkerbell_core.errors import Problem, TinkerbellError
from tinkerbell_core.types import SampleOutput
from tinkerbell_server.commands import Sample, SampleResult
from tinkerbell_server.engines.torch.generate import Tokenizer, generate
from tinkerbell_server.engines.torch.models import Models
from tinkerbell_server.engines.torch.network import Network


class Sampler:
    """Samples from trained models, from saved ones and from the base model."""

    def __init__(self, models: Models, tokenizer: Tokenizer) -> None:
        """tokenizer: used for stop strings and for the text of the samples."""
        self._models, self._tokenizer = models, tokenizer

    def sample(self, command: Sample) -> SampleOutput:
        """Raises UnknownModel, BadCheckpoint."""
        (result,) = self.sample_together([command])
        if result.problem is not None:
            raise result.problem.error()
        assert result.output is not None
        return result.output

    def sample_together(self, commands: Sequence[Sample]) -> list[SampleResult]:
        """The output or the error of each command; an error of one command does not affect the others."""
        results: dict[int, SampleResult] = {}
        by_network: dict[tuple[str | None, str | None], list[int]] = {}
        for index, command in enumerate(commands):
            by_network.setdefault((command.path, command.model_id), []).append(index)
        for indices in by_network.values():
            try:
                network = self._activate(commands[indices[0]])
            except TinkerbellError as error:
                results.update(dict.fromkeys(indices, SampleResult(problem=Problem.of(error))))
                continue
            generated = generate(network, self._tokenizer, [commands[index] for index in indices])
            for index, own in zip(indices, generated, strict=True):
                output = SampleOutput(
                    model_id=commands[index].model_id,
                    prompt_tokens=len(commands[index].prompt),
                    sequences=own.sequences,
                    prompt=own.prompt,
                )
                results[index] = SampleResult(output=output)
        return [results[index] for index in range(len(commands))]

    def _activate(self, command: Sample) -> Network:
        if command.path is not None:
            network = self._models.snapshot(Path(command.path))
        elif command.model_id is not None:
            network = self._models.activate(self._models.get(command.model_id))
        else:
            network = self._models.activate(None)
        network.mode(train=False)
        return network
