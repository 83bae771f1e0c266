"""The server: an API process that never imports torch, and an engine that owns the device."""
