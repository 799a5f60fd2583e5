"""`profile-latency`: what the parts of a step take, and what a schedule will."""
