"""An edit as a file and on a model."""
