"""The `trireme` command line."""
