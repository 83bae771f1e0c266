"""Keys, limits, bodies and errors over HTTP, for every API. Imports only `access`, `config` and tinkerbell_core."""
