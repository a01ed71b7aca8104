"""Every route in a line, and the type that its body is read as: what /openapi.json is made of."""

from __future__ import annotations

from typing import Any

from qwenrt.server.adapter_routes import LoadAdapter, UnloadAdapter
from qwenrt.server.openai_routes import Control
from qwenrt.text.dialects import (
    anthropic,
    dashscope,
    ollama,
    openai_chat,
    openai_completions,
    openai_models,
    openai_responses,
    openai_retrieval,
)

POSTS: dict[str, tuple[str, Any]] = {
    "/v1/chat/completions": ("An answer in a conversation", openai_chat.ChatRequest),
    "/v1/chat/completions/render": ("The prompt of a conversation, as text and ids", openai_chat.ChatRequest),
    "/v1/chat/completions/input_tokens": ("How many tokens that prompt has", openai_chat.ChatRequest),
    "/v1/chat/completions/control": ("End the thought of an answer that is being written", Control),
    "/v1/completions": ("Texts continued", openai_completions.CompletionRequest),
    "/v1/completions/render": ("The token ids of these texts", openai_completions.CompletionRequest),
    "/v1/responses": ("A response, as OpenAI's newer clients ask for it", openai_responses.Request),
    "/v1/responses/input_tokens": ("How many tokens its prompt has", openai_responses.CountRequest),
    "/v1/messages": ("A message, as Anthropic's clients ask for it", anthropic.Request),
    "/v1/messages/count_tokens": ("How many tokens its prompt has", anthropic.CountRequest),
    "/v1/embeddings": ("Vectors of texts", openai_retrieval.EmbeddingRequest),
    "/v1/rerank": ("How well documents answer a query", openai_retrieval.RerankRequest),
    "/v1/score": ("How well texts answer texts", openai_retrieval.ScoreRequest),
    "/tokenize": ("A text or a conversation as token ids", openai_models.TokenizeRequest),
    "/detokenize": ("Token ids as text", openai_models.DetokenizeRequest),
    "/api/chat": ("An answer in a conversation, as Ollama's clients ask for it", ollama.ChatRequest),
    "/api/generate": ("An answer to a prompt, as Ollama's clients ask for it", ollama.GenerateRequest),
    "/api/embed": ("Vectors of texts, as Ollama's clients ask for them", ollama.EmbedRequest),
    "/api/embeddings": (
        "The vector of a text, as older clients of Ollama ask for it",
        ollama.EmbeddingsRequest,
    ),
    "/api/show": ("What the model is", ollama.ShowRequest),
    "/api/v1/services/aigc/text-generation/generation": (
        "An answer in a conversation, as DashScope's clients ask for it",
        dashscope.GenerationRequest,
    ),
}
# Those that a server has if it was started with --adapter-directory.
ADMINISTRATORS: dict[str, tuple[str, Any]] = {
    "/v1/load_lora_adapter": ("Load an adapter", LoadAdapter),
    "/v1/unload_lora_adapter": ("Unload an adapter", UnloadAdapter),
}
GETS = {
    "/": "The page for a browser; without it, a line that says what is served",
    "/health": "Whether the process and its engine live",
    "/ready": "Whether a request that comes now would be served",
    "/metrics": "Figures for Prometheus",
    "/version": "The version of qwenrt",
    "/server_info": "The model, where and how it runs, limits",
    "/openapi.json": "This description",
    "/v1/models": "The names that the model is served as",
    "/v1/models/{name}": "One of them",
    "/v1/loads": "How busy the server is",
    "/v1/responses/{id}": "A response that was kept",
    "/v1/streams": "Streams that are kept for X-Conversation-Id",
    "/v1/stream": "Such a stream, from a byte on",
    "/api/tags": "The names that the model is served as, as Ollama lists them",
    "/api/ps": "The model that is loaded, as Ollama lists it",
    "/api/version": "The version of Ollama whose answers these are",
}
