"""The `meteor` command: one file a subcommand."""
