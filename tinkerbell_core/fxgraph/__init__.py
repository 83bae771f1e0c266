"""A loss as a torch.fx graph in JSON, as the Tinker SDK sends it: parsing, checks and execution. Not other uploads."""
