"""The policies: which tokens each step runs on."""
