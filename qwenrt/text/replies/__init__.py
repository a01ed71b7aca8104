"""A model's text to an answer: thoughts, content and tool calls, whole or as it arrives."""
