"""The model asks for a tool, the program runs it, the model answers.

python examples/tool_use.py [MODEL]
"""

import json
import sys

import qwenrt

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Get the current weather of a city. Format the arguments as a JSON object.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "description": "The name of the city"}},
                "required": ["city"],
            },
        },
    }
]


def get_weather(city: str) -> str:
    return f"{city}: sunny, 21 degrees"


with qwenrt.load(sys.argv[1] if len(sys.argv) > 1 else "demo") as llm:
    messages = [{"role": "user", "content": "What is the weather in Paris?"}]
    for _ in range(4):  # a model that never stops calling is stopped here
        reply = llm.chat(messages=messages, tools=TOOLS, temperature=0)
        messages.append(reply.message)
        if reply.finish_reason != "tool_calls":
            break
        for call in reply.message["tool_calls"]:
            print(f"calls {call['function']['name']}({call['function']['arguments']})")
            try:
                result = get_weather(**json.loads(call["function"]["arguments"]))
            except (ValueError, TypeError) as error:  # what a model writes need not fit: tell it so
                result = f"error: {error}"
            messages.append({"role": "tool", "tool_call_id": call["id"], "content": result})
    print(messages[-1]["content"])
