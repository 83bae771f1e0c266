"""The built-in losses, each a plugin like any other."""
