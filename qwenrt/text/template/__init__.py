"""Chat templates in a sandbox: what they may call, at what cost, and who wrote which character of what they render."""
