"""One request: its steps, its guidance branches, and the calls of FRONT and BACK."""
