"""Which of our losses, with which hyperparameters, is which of the peers': one module of entries a package.

A module `<package>.py` here holds `MAPPING`, a list of `form.Entry`; the first entry that takes a record decides.
`python -m tests.oracles FILE` compares all records of a file.
"""
