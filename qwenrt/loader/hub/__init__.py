"""From a model's name to a directory on this machine."""
