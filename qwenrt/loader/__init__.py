"""From a name to packed weights on a device: find the files, check them, assign every tensor."""
