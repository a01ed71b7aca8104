"""A system prompt changes how the model answers.

python examples/system_prompt.py [MODEL]
"""

import sys

import qwenrt

with qwenrt.load(sys.argv[1] if len(sys.argv) > 1 else "demo") as llm:
    for system in ("You are a helpful assistant.", "You are a pirate."):
        response, _ = llm.chat("What is the capital of Italy?", system=system, temperature=0)
        print(f"[{system}] {response}")
