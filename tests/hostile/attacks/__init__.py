"""The attacks of hostile losses. An attack that obtains something it must not have returns it as a text."""
