"""The `muws` command: main parses and reports errors, other files have the subcommands. Needs no Lightning."""
