"""The commands; they put the packages together."""
