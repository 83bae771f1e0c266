"""The contents of a request, parsed and checked once. Imports `commands` and `tinkerbell_core`, and no torch."""
