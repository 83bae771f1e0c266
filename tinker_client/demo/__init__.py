"""The demo: an ordinary client that starts a server beside it, trains from nothing, then with a loss of its own."""
