"""The built-in model: a real Qwen-1 directory of a few megabytes, and the small world it was trained on."""
