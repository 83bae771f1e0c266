"""tinker-cookbook's own loops against a server on the embedded model: `python .ci/cookbook.py` runs all four.

The cookbook's code is as it was installed. Given to it are a local model with its renderer, small batches, local
data, and loss_fn="importance_sampling" where its default is stable_reinforce. Each program must end.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

RENDERER = "qwen3_instruct"
METRICS = {
    "arithmetic": ("env/all/reward/total", "up"),
    "guess_number": ("env/all/ac_tokens_per_turn", "down"),
    "supervised": ("train_mean_nll", "down"),
    "dpo": ("dpo_loss", "down"),
}
"""What is read of each program's metrics.jsonl, and where it should go."""


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


def guess_number(model: str, log: str) -> None:
    """Several turns, each an answer to what the environment said."""
    import chz
    from tinker_cookbook.recipes.multiplayer_rl.guess_number import train as recipe
    from tinker_cookbook.rl import train

    config = recipe.build_config(
        recipe.CLIConfig(
            model_name=model,
            renderer_name=RENDERER,
            group_size=4,
            batch_size=4,
            learning_rate=3e-3,
            max_tokens=6,
            eval_every=0,
            save_every=0,
            max_steps=5,
            log_path=log,
        )
    )
    asyncio.run(train.main(chz.replace(config, loss_fn="importance_sampling")))


def supervised(model: str, log: str) -> None:
    """Conversations of a local file."""
    from tinker_cookbook.renderers import TrainOnWhat
    from tinker_cookbook.supervised import train
    from tinker_cookbook.supervised.data import FromConversationFileBuilder

    file = Path(log).parent / "conversations.jsonl"
    with file.open("w") as out:
        for number in range(48):
            turns = [("user", f"Count from {number}."), ("assistant", f"{number}, {number + 1}, {number + 2}.")]
            out.write(json.dumps({"messages": [{"role": role, "content": text} for role, text in turns]}) + "\n")
    builder = FromConversationFileBuilder(
        common_config=_common(model, 8, train_on_what=TrainOnWhat.ALL_ASSISTANT_MESSAGES), file_path=str(file)
    )
    config = train.Config(
        log_path=log,
        model_name=model,
        recipe_name="tinkerbell_supervised",
        renderer_name=RENDERER,
        dataset_builder=builder,
        learning_rate=3e-3,
        num_epochs=2,
        lora_rank=16,
        eval_every=0,
        save_every=5,
    )
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
    "arithmetic": arithmetic,
    "guess_number": guess_number,
    "supervised": supervised,
    "dpo": dpo,
}


def _common(
    model: str, batch_size: int, **options: Any
) -> Any:  # Any: the cookbook is not installed where this is typed
    from tinker_cookbook.supervised.types import ChatDatasetBuilderCommonConfig

    return ChatDatasetBuilderCommonConfig(
        model_name_for_tokenizer=model, renderer_name=RENDERER, max_length=256, batch_size=batch_size, **options
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
            key, _ = METRICS[name]
            steps = (log / "metrics.jsonl").read_text().splitlines() if (log / "metrics.jsonl").exists() else []
            numbers = [step[key] for step in map(json.loads, steps) if key in step]
            moved = f"{key} {numbers[0]:.4f} -> {numbers[-1]:.4f} in {len(numbers)} steps" if numbers else f"no {key}"
            print(f"{name}: {'ended' if status == 0 else f'failed ({status})'}; {moved}", flush=True)
            wrong += status != 0 or not numbers
            if status != 0:
                print((folder / f"{name}.log").read_text(errors="replace")[-3000:])
    return int(wrong > 0)


def main() -> int:
    if sys.argv[1:2] == ["--program"]:
        name, model, log = sys.argv[2:]
        PROGRAMS[name](model, log)
        return 0
    with tempfile.TemporaryDirectory(prefix="tinkerbell-cookbook-") as folder:
        return run_all(sys.argv[1:] or list(PROGRAMS), Path(folder))


if __name__ == "__main__":
    sys.exit(main())
