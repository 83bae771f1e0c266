"""Write a loss pickled by the Python that runs this, with its cloudpickle, into the folder given: `python make.py .`

Those beside this file were made by Debian's python3 and python3-cloudpickle of bullseye, trixie and sid. It needs no
torch: the loss imports what it uses when it is called.
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
