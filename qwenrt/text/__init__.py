"""Text on both sides of the model: tokenizer, chat prompts, streams of text, tool calls. Never torch."""
