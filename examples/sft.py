"""Supervised fine-tuning on chats. Only the assistant's tokens train, and `submit` pipelines the steps."""

from __future__ import annotations

import argparse

from tinker_client import TinkerClient

CHATS = [
    [{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "Tinker Bell."}],
    [{"role": "user", "content": "Where do you live?"}, {"role": "assistant", "content": "Neverland."}],
]


def main(url: str | None = None, steps: int = 40) -> list[float]:
    """Train, sample before and after, and return the loss in nats per token of each step."""
    with TinkerClient(url) as client:
        hf_backend = client.hf_backend
        hf_backend.create_model("sft", rank=16)
        prompt = CHATS[0][:1]
        before = hf_backend.sample(prompt, model_id="sft", temperature=0, max_tokens=16)
        print("before:", repr(before.sequences[0].text))

        futures = []
        for _ in range(steps):
            futures.append(hf_backend.submit("forward_backward", model_id="sft", data=CHATS))
            hf_backend.submit("optim_step", model_id="sft", learning_rate=5e-3, normalize="tokens")
        losses = []
        for step, future in enumerate(futures):
            result = future.result()
            losses.append(result.loss / result.counted_tokens)
            if step % 5 == 0:
                print(f"step {step}: {losses[-1]:.3f} nats per token")

        after = hf_backend.sample(prompt, model_id="sft", temperature=0, max_tokens=16)
        print("after:", repr(after.sequences[0].text))
        hf_backend.delete_model("sft")
        return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", help="the server; default: TINKERBELL_URL, else http://localhost:8000")
    main(parser.parse_args().url)
