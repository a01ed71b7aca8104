"""NVIDIA and AMD GPUs."""
