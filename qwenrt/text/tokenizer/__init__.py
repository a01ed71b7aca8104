"""Text to token ids and back: the vocabularies of every generation."""
