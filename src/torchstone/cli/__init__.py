"""The command line. Importing this package imports nothing; `torchstone.cli.main` holds the entry point."""
