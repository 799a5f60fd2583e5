"""The engine set on disk, the ladder of reference lengths, and what builds and loads them."""
