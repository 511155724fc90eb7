"""The `muws` command, one file for each family of subcommands."""
