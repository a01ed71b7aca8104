"""An HTTP server around a loaded model, for the clients of OpenAI, Anthropic, Ollama and DashScope."""
