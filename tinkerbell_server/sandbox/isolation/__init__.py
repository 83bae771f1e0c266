"""Confines a process with bubblewrap, Landlock, seccomp and limits. Imports only the standard library and itself."""
