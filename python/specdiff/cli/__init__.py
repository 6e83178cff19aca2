"""The command line: `specdiff` and its commands."""
