"""A LogitsSource for hidden states and a head in this process. It computes logits one chunk at a time."""
