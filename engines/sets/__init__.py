"""Engine sets on disk: manifest, identity, checks, and how they are put in place."""
