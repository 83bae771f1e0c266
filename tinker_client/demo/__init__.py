"""The demo: trains a random model with a built-in loss, then with an uploaded one. Imports only the client and core."""
