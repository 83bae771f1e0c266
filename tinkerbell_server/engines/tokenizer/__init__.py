"""The tokenizer process and its client. Only the process imports transformers; it uses no device."""
