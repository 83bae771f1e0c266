"""Samples that were asked of models, saved ones and the base: drawn together where they are of one network."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tinkerbell_core.errors import Problem, TinkerbellError
from tinkerbell_core.types import SampleOutput
from tinkerbell_server.calls.text import chat_ids
from tinkerbell_server.commands import Drawn, Sample
from tinkerbell_server.engines.torch import generate
from tinkerbell_server.engines.torch.models import Models
from tinkerbell_server.engines.torch.network import Network, Transformer


class Sampler:
    def __init__(self, models: Models, tokenizer: Transformer) -> None:
        self._models, self._tokenizer = models, tokenizer

    def one(self, command: Sample) -> SampleOutput:
        (drawn,) = self.many([command])
        if drawn.problem is not None:
            raise drawn.problem.error()
        assert drawn.output is not None
        return drawn.output

    def many(self, commands: Sequence[Sample]) -> list[Drawn]:
        """Each by itself where one cannot be had; those of one network in batches."""
        drawn: dict[int, Drawn] = {}
        prompts: dict[tuple[str | None, str | None], dict[int, generate.Prompt]] = {}
        for index, command in enumerate(commands):
            try:
                prompt = generate.Prompt(self._prompt_ids(command), command)
                generate.check(prompt, self._network_of(command))
                prompts.setdefault((command.path, command.model_id), {})[index] = prompt
            except TinkerbellError as error:
                drawn[index] = Drawn(problem=Problem.of(error))
        for same in prompts.values():
            network = self._network_of(commands[next(iter(same))])
            network.mode(train=False)
            for index, continued in zip(
                same, generate.sample_many(network, self._tokenizer, list(same.values())), strict=True
            ):
                output = SampleOutput(
                    model_id=commands[index].model_id,
                    prompt_tokens=len(same[index].ids),
                    sequences=continued.sequences,
                    prompt=continued.prompt,
                )
                drawn[index] = Drawn(output=output)
        return [drawn[index] for index in range(len(commands))]

    def _network_of(self, command: Sample) -> Network:
        if command.path is not None:
            return self._models.snapshot(Path(command.path))
        return self._models.activate(None if command.model_id is None else self._models.get(command.model_id))

    def _prompt_ids(self, command: Sample) -> list[int]:
        match command.prompt:
            case str(text):
                return list(self._tokenizer(text)["input_ids"])
            case [dict(), *_]:
                chat = [message for message in command.prompt if isinstance(message, dict)]
                return chat_ids("the prompt", chat, self._tokenizer, add_generation_prompt=True)
            case _:
                return [token for token in command.prompt if isinstance(token, int)]
