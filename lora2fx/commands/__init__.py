"""The command line's subcommands, one file each: `add_parser` states its options, and what runs it."""
