"""The OpenAI API under /v1. Imports what `api` may import, and the Tinker API's models and checkpoints."""
