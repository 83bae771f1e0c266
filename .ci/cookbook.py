"""tinker-cookbook's own loops against a server on the embedded model: `python .ci/cookbook.py` runs all four.

The cookbook's code is as it was installed. Given to it are a local model with its renderer, small batches, local
data, and loss_fn="importance_sampling" where its default is stable_reinforce. Each program must end, and get better.
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
"""What is read of each program's metrics.jsonl, and where it must go."""


def arithmetic(model: str, log: str) -> None:
    """Reward: 0.1 less where an answer does not end. A model of random weights can learn to end it."""
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
    """Conversations of a local file: turns of guess-number, a third of them in words its environment cannot read."""
    from tinker_cookbook.recipes.multiplayer_rl.guess_number.env import FAIL_TO_PARSE, SYSTEM_PROMPT
    from tinker_cookbook.renderers import TrainOnWhat
    from tinker_cookbook.supervised import train
    from tinker_cookbook.supervised.data import FromConversationFileBuilder

    chance = random.Random(0)

    def said() -> str:
        return chance.choice(("Guess: {}", "Guess: {}", "Maybe {}")).format(chance.randrange(1024))

    file = Path(log).parent / "conversations.jsonl"
    with file.open("w") as out:
        for index in range(3200):
            told = chance.choice(("Too low", "Too high", FAIL_TO_PARSE))
            # one in eight begins as the environment does, with 230 tokens more
            begin = [("system", SYSTEM_PROMPT)] if index % 8 == 0 else [("player", said()), ("user", told)]
            turns = [*begin, ("assistant", said())]
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
    """Ten turns at most, from the weights that `supervised` left. Reward: -1 for each turn that cannot be read."""
    import chz
    from tinker_cookbook.checkpoint_utils import get_last_checkpoint
    from tinker_cookbook.recipes.multiplayer_rl.guess_number import train as recipe
    from tinker_cookbook.rl import train

    start = get_last_checkpoint(str(Path(log).parent / "supervised"))
    if start is None:
        raise SystemExit("guess_number goes on from what `supervised` saved: run that before it")
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
    """Pairs of a local file; the loss is computed by the client, from forward_backward_custom."""
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


def _common(
    model: str, batch_size: int, **options: Any
) -> Any:  # Any: the cookbook is not installed where this is typed
    from tinker_cookbook.supervised.types import ChatDatasetBuilderCommonConfig

    return ChatDatasetBuilderCommonConfig(
        model_name_for_tokenizer=model, renderer_name=RENDERER, max_length=512, batch_size=batch_size, **options
    )


def run_all(names: list[str], folder: Path) -> int:
    """Each program in a process of its own; the exit status."""
    from tests.live import live_server

    wrong = 0
    with live_server(folder, "--device", "cpu", seconds=600) as url:
        model = str(folder / "data" / "models" / "embedded")
        given = {"TINKER_BASE_URL": url, "TINKER_API_KEY": "tml-local", "TINKER_TELEMETRY": "0", "HF_HUB_OFFLINE": "1"}
        for name in names:
            log = folder / name
            with (folder / f"{name}.log").open("wb") as out:
                command = [sys.executable, __file__, "--program", name, model, str(log)]
                status = subprocess.call(command, env={**os.environ, **given}, stdout=out, stderr=out)
            key, way = METRICS[name]
            numbers = _numbers(log / "metrics.jsonl", key)
            better = _better(numbers, way)
            end = "ended" if status == 0 else f"failed ({status})"
            print(f"{name}: {end}; {_told(key, numbers)}{'' if better else '; NOT better'}", flush=True)
            wrong += status != 0 or not better
            if status != 0:
                print((folder / f"{name}.log").read_text(errors="replace")[-3000:])
    return int(wrong > 0)


def _numbers(metrics: Path, key: str) -> list[float]:
    """What a program logged under this name, step by step."""
    steps = map(json.loads, metrics.read_text().splitlines() if metrics.exists() else [])
    return [step[key] for step in steps if key in step]


def _ends(numbers: list[float]) -> tuple[float, float]:
    """Means of the first and of the last quarter: a reward jumps from step to step."""
    quarter = max(len(numbers) // 4, 1)
    return fmean(numbers[:quarter]), fmean(numbers[-quarter:])


def _better(numbers: list[float], way: str) -> bool:
    if len(numbers) < 2:
        return False
    before, after = _ends(numbers)
    return after > before if way == "up" else after < before


def _told(key: str, numbers: list[float]) -> str:
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
