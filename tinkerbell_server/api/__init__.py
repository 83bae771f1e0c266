"""The APIs over HTTP, one package or module each. Imports http, service, calls, access, commands and config."""
