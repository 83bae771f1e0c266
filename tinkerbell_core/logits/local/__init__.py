"""Answers about rows from hidden states and a head in this process, a chunk of logits at a time."""
