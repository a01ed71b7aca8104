"""Messages to prompts: ChatML and ReAct for Qwen-1, chat templates for all others; conversations saved in files."""
