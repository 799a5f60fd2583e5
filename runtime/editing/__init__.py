"""What `edit-image` needs around the engines: pipelines, pictures, results."""
