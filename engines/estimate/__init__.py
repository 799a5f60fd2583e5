"""`build-engine --dry-run`: what a set takes before it is built."""
