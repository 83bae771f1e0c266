"""A tensor that stands for logits nobody stores: the formula it holds, and what torch's functions do to it."""
