"""Continue a text, as base models do.

python examples/base_completion.py [MODEL]
"""

import sys

import qwenrt

with qwenrt.load(sys.argv[1] if len(sys.argv) > 1 else "demo") as llm:
    prompt = "蒙古国的首都是乌兰巴托(Ulaanbaatar)\n冰岛的首都是雷克雅未克(Reykjavik)\n埃塞俄比亚的首都是"
    out = llm.generate(prompt, qwenrt.SamplingParams(max_tokens=16, temperature=0))
    print(prompt + out.text)
    print(f"[{out.finish_reason}, {out.usage.completion_tokens} tokens]")
