"""What executes the graphs of an engine set; `engines.backend.Engines` is their interface."""
