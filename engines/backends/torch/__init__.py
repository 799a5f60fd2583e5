"""The torch backend: FRONT and BACK as the pipeline's own transformer runs them."""
