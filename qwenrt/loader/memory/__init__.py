"""What a model takes in memory, told from its config alone, and what a device has."""
