"""The `meteor` command: one file per subcommand."""
