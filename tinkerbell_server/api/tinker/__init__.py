"""The Tinker wire: what the stock `tinker` SDK says, in words of this server's own. Knows no HTTP; imports no torch.

bodies and wire_pb2 are its words, datums and results translate them, store keep its nouns (sessions, training runs,
samplers, checkpoints), order puts a run's requests into their order, and training, sampling, checkpoints do the rest.
"""
