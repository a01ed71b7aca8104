"""A chat endpoint of your own that streams: `pip install fastapi uvicorn`, then `python examples/fastapi_app.py`.

    curl -N localhost:8001/chat -H 'content-type: application/json' \
        -d '{"messages": [{"role": "user", "content": "What is the capital of France?"}]}'

All requests share one engine. A client that goes away ends its work there. For OpenAI's routes and more there is
`qwenrt serve`.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, HTTPException
from fastapi.responses import StreamingResponse
from pydantic import BaseModel

import qwenrt

llm = qwenrt.load("demo")
app = FastAPI()


class Chat(BaseModel):
    messages: list[dict[str, Any]]
    max_tokens: int = 256
    stream: bool = True


@app.post("/chat")
async def chat(body: Chat) -> Any:
    asked: dict[str, Any] = {
        "messages": body.messages,
        "max_tokens": body.max_tokens,
        "temperature": 0,
        "timeout": 60,
    }
    try:
        if not body.stream:
            generation = await llm.achat(**asked)
            return {"message": generation.message, "tokens_per_s": generation.timing.tokens_per_s}
        # What is wrong with a request is found before the first byte of the answer.
        pieces = llm.astream(**asked)
        first = await anext(pieces)
    except qwenrt.RequestError as error:
        raise HTTPException(400, str(error)) from error
    return StreamingResponse(events(first, pieces), media_type="text/event-stream")


async def events(first: qwenrt.Delta, pieces: AsyncIterator[qwenrt.Delta]) -> AsyncIterator[str]:
    yield event(first)
    async for delta in pieces:
        yield event(delta)


def event(delta: qwenrt.Delta) -> str:
    return f"data: {json.dumps({'text': delta.text, 'finish_reason': delta.finish_reason})}\n\n"


if __name__ == "__main__":
    import uvicorn

    uvicorn.run(app, host="127.0.0.1", port=8001)
