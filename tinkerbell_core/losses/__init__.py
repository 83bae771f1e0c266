"""The built-in losses, one module per loss. They are loaded as plugins, like installed losses."""
