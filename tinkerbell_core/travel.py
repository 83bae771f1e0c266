def rebuild(payload): raise NotImplementedError
