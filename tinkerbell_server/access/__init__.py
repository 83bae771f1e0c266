"""Keys, tenants, audit, rates: access control. Imports only `config`, `database` and tinkerbell_core."""
