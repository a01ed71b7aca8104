"""Chat templates in a sandbox: what they may call, at what cost, and which characters are their own."""
