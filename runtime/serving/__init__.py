"""Serve edits over HTTP: the application and what it is made of."""
