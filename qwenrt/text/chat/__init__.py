"""Messages to prompts: ChatML and ReAct of Qwen-1, chat templates of all others; conversations kept in files."""
