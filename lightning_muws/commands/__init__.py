"""The `muws` command: main parses and reports errors, files and bench are the subcommands. Needs no Lightning."""
