"""Chat in three turns, then the same answer piece by piece.

python examples/quickstart.py [MODEL]
"""

import sys

import qwenrt

with qwenrt.load(sys.argv[1] if len(sys.argv) > 1 else "demo") as llm:
    response, history = llm.chat("你好", history=None)
    print(response)
    response, history = llm.chat("给我讲一个年轻人奋斗创业最终取得成功的故事。", history=history)
    print(response)
    response, history = llm.chat("给这个故事起一个标题", history=history)
    print(response)

    for delta in llm.stream("What is the capital of France?"):
        print(delta.text, end="", flush=True)
    print()
