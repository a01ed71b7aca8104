"""A checkpoint's files: which tensors they hold, under which names and in which format."""
