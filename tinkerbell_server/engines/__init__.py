"""Engines run losses on a model. `base` says what one is, `host` runs one in its own process, `link` talks to it."""
