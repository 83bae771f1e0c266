"""Pickles a loss with the running Python and its cloudpickle into a folder: `python make.py FOLDER`.

The files in this folder were written with python3 and python3-cloudpickle of Debian bullseye, trixie and sid. The
script does not need torch, because the loss imports it when it is called.
"""

import importlib.util
import json
import pathlib
import platform
import sys

import cloudpickle


def likelihood(model_outputs, loss_fn_inputs, attention_mask):
    import torch

    from tinker_client import LossFnOutput

    targets = loss_fn_inputs["target_tokens"]
    every = torch.log_softmax(model_outputs, dim=-1)
    chosen = every.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    try:
        sums = [float(row) for row in (chosen * attention_mask).sum(-1)]
    except ValueError:
        raise RuntimeError(f"{targets.shape} is no shape of mine") from None
    loss = -(chosen * attention_mask).sum()
    return LossFnOutput(loss=loss, logprobs=chosen, diagnostics={"longest": max(sums)})


if __name__ == "__main__":
    here = pathlib.Path(sys.argv[1])
    stem = "python" + ".".join(platform.python_version_tuple()[:2])
    (here / (stem + ".pickle")).write_bytes(cloudpickle.dumps(likelihood))
    envelope = {"python": platform.python_version(), "magic": importlib.util.MAGIC_NUMBER.hex()}
    (here / (stem + ".json")).write_text(json.dumps(envelope) + "\n")
