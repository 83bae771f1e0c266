"""Engine and tokenizer processes, and the clients of both. Imports sandbox, calls, commands and config."""
