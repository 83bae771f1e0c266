"""Runs uploaded losses in processes without weights, network or write access. Imports only tinkerbell_core and itself.

The one exception is the zygote, which imports tinker_client because a pickled loss may refer to it.
"""
