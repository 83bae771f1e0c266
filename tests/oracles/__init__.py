"""Maps the losses of other projects (peers) to our losses and hyperparameters: one module of entries per package.

A module `<package>.py` in this folder has `MAPPING`, a list of `form.Entry`. The first entry that matches a record is
used. `python -m tests.oracles FILE` compares all records of a file.
"""
