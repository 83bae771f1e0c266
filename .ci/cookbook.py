"""Runs four training loops of tinker-cookbook against a server with the embedded model: `python .ci/cookbook.py`.

The code of the cookbook is not changed. Its configuration names a local model with its renderer, small batches, local
data, and loss_fn="importance_sampling" if the default is stable_reinforce. Each loop must end, and must improve its
metric.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

RENDERER = "qwen3_instruct"
METRICS = {
    "supervised": ("train_mean_nll", "down"),
    "dpo": ("dpo_loss", "down"),
    "arithmetic": ("env/all/reward/total", "up"),
    "guess_number": ("env/all/reward/total", "up"),
}
"""The metric of each program in its metrics.jsonl, and the direction in which it must change."""


def arithmetic(model: str, log: str) -> None:
    """The reward is 0.1 lower if an answer does not end. A model with random weights can learn to end it."""
    from tinker_cookbook.recipes.math_rl import train

    config = train.CLIConfig(
        model_name=model,
        renderer_name=RENDERER,
        group_size=8,
        groups_per_batch=12,
        learning_rate=3e-3,
        max_tokens=5,
        loss_fn="importance_sampling",
        max_steps=12,
        eval_every=0,
        save_every=0,
        lora_rank=16,
        log_path=log,
    )
    asyncio.run(train.cli_main(config))


def supervised(model: str, log: str) -> None:
    """Conversations from a local file: turns of guess-number. Its environment cannot parse a third of the guesses."""
    from tinker_cookbook.recipes.multiplayer_rl.guess_number.env import FAIL_TO_PARSE, SYSTEM_PROMPT
    from tinker_cookbook.renderers import TrainOnWhat
    from tinker_cookbook.supervised import train
    from tinker_cookbook.supervised.data import FromConversationFileBuilder

    chance = random.Random(0)

    def guess() -> str:
        return chance.choice(("Guess: {}", "Guess: {}", "Maybe {}")).format(chance.randrange(1024))

    file = Path(log).parent / "conversations.jsonl"
    with file.open("w") as out:
        for index in range(3200):
            answer = chance.choice(("Too low", "Too high", FAIL_TO_PARSE))
            # one in eight starts with the system prompt of the environment, which has 230 tokens
            start = [("system", SYSTEM_PROMPT)] if index % 8 == 0 else [("player", guess()), ("user", answer)]
            turns = [*start, ("assistant", guess())]
            out.write(json.dumps({"messages": [{"role": role, "content": text} for role, text in turns]}) + "\n")
    builder = FromConversationFileBuilder(
        common_config=_common(model, 32, train_on_what=TrainOnWhat.ALL_ASSISTANT_MESSAGES), file_path=str(file)
    )
    config = train.Config(
        log_path=log,
        model_name=model,
        recipe_name="tinkerbell_supervised",
        renderer_name=RENDERER,
        dataset_builder=builder,
        learning_rate=3e-3,
        num_epochs=1,
        lora_rank=16,
        eval_every=0,
        save_every=20,
    )
    asyncio.run(train.main(config))


def guess_number(model: str, log: str) -> None:
    """At most ten turns, from the weights that `supervised` saved. A guess that is not parsed has the reward -1."""
    import chz
    from tinker_cookbook.checkpoint_utils import get_last_checkpoint
    from tinker_cookbook.recipes.multiplayer_rl.guess_number import train as recipe
    from tinker_cookbook.rl import train

    start = get_last_checkpoint(str(Path(log).parent / "supervised"))
    if start is None:
        raise SystemExit("guess_number starts from the checkpoint that `supervised` saves: run `supervised` first")
    config = recipe.build_config(
        recipe.CLIConfig(
            model_name=model,
            renderer_name=RENDERER,
            group_size=8,
            batch_size=1,
            learning_rate=4e-4,
            max_tokens=12,
            eval_every=0,
            save_every=0,
            max_steps=10,
            log_path=log,
        )
    )
    config = chz.replace(config, loss_fn="importance_sampling", load_checkpoint_path=start.state_path)
    asyncio.run(train.main(config))


def dpo(model: str, log: str) -> None:
    """Pairs from a local file; the client computes the loss with forward_backward_custom."""
    from tinker_cookbook.preference import train_dpo
    from tinker_cookbook.preference.dpo_datasets import DPODatasetBuilderFromComparisons
    from tinker_cookbook.preference.preference_datasets import ComparisonBuilderFromJsonl

    file = Path(log).parent / "pairs.jsonl"
    with file.open("w") as out:
        for number in range(48):
            comparison = {
                "prompt_conversation": [{"role": "user", "content": f"Say {number}."}],
                "completion_A": [{"role": "assistant", "content": f"{number}."}],
                "completion_B": [{"role": "assistant", "content": "I would rather not."}],
            }
            out.write(json.dumps({"comparison": comparison, "label": "A"}) + "\n")
    config = train_dpo.Config(
        log_path=log,
        model_name=model,
        recipe_name="tinkerbell_dpo",
        renderer_name=RENDERER,
        dataset_builder=DPODatasetBuilderFromComparisons(
            comparison_builder=ComparisonBuilderFromJsonl(train_path=str(file)), common_config=_common(model, 8)
        ),
        evaluator_builders=[],
        learning_rate=1e-3,
        dpo_beta=0.1,
        lora_rank=16,
        eval_every=0,
        save_every=0,
    )
    train_dpo.main(config)


PROGRAMS: dict[str, Callable[[str, str], None]] = {
    "supervised": supervised,
    "dpo": dpo,
    "arithmetic": arithmetic,
    "guess_number": guess_number,
}


def _common(model: str, batch_size: int, **options: Any) -> Any:  # Any: mypy runs without the cookbook
    from tinker_cookbook.supervised.types import ChatDatasetBuilderCommonConfig

    return ChatDatasetBuilderCommonConfig(
        model_name_for_tokenizer=model, renderer_name=RENDERER, max_length=512, batch_size=batch_size, **options
    )


def run_all(names: list[str], folder: Path) -> int:
    """Run each program in a new process; the exit status of this script."""
    from tests.live import live_server

    failures = 0
    with live_server(folder, device="cpu", seconds=600) as url:
        model = str(folder / "data" / "models" / "embedded")
        variables = {
            "TINKER_BASE_URL": url,
            "TINKER_API_KEY": "tml-local",
            "TINKER_TELEMETRY": "0",
            "HF_HUB_OFFLINE": "1",
        }
        for name in names:
            log = folder / name
            with (folder / f"{name}.log").open("wb") as out:
                command = [sys.executable, __file__, "--program", name, model, str(log)]
                status = subprocess.call(command, env={**os.environ, **variables}, stdout=out, stderr=out)
            key, direction = METRICS[name]
            numbers = _numbers(log / "metrics.jsonl", key)
            better = _better(numbers, direction)
            end = "ended" if status == 0 else f"failed ({status})"
            print(f"{name}: {end}; {_summary(key, numbers)}{'' if better else '; NOT better'}", flush=True)
            failures += status != 0 or not better
            if status != 0:
                print((folder / f"{name}.log").read_text(errors="replace")[-3000:])
    return int(failures > 0)


def _numbers(metrics: Path, key: str) -> list[float]:
    """The value of a metric at each step at which the program logged it."""
    steps = map(json.loads, metrics.read_text().splitlines() if metrics.exists() else [])
    return [step[key] for step in steps if key in step]


def _ends(numbers: list[float]) -> tuple[float, float]:
    """The means of the first and of the last quarter, because a reward varies much from step to step."""
    quarter = max(len(numbers) // 4, 1)
    return fmean(numbers[:quarter]), fmean(numbers[-quarter:])


def _better(numbers: list[float], direction: str) -> bool:
    if len(numbers) < 2:
        return False
    before, after = _ends(numbers)
    return after > before if direction == "up" else after < before


def _summary(key: str, numbers: list[float]) -> str:
    if not numbers:
        return f"no {key}"
    before, after = _ends(numbers)
    return f"{key} {before:.4f} -> {after:.4f} (first and last quarter of {len(numbers)} steps)"


def main() -> int:
    if sys.argv[1:2] == ["--program"]:
        name, model, log = sys.argv[2:]
        PROGRAMS[name](model, log)
        return 0
    with tempfile.TemporaryDirectory(prefix="tinkerbell-cookbook-") as folder:
        return run_all(sys.argv[1:] or list(PROGRAMS), Path(folder))


if __name__ == "__main__":
    sys.exit(main())
