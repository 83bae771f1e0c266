"""Where uploaded losses run: processes that hold no weights, see no network and cannot write. Knows nothing of HTTP."""
