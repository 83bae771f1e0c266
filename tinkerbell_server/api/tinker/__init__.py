"""The Tinker API under /api/v1, for the stock `tinker` SDK. Imports what `api` may import.

protocol and wire_pb2 are the bodies, decode and encode translate them, store holds the records of sessions, runs,
samplers and checkpoints, sequencer orders the requests of a run, and requests passes them to the intake.
"""
