"""Several prompts in one engine run. Each gets what it would get alone.

python examples/batch.py [MODEL]
"""

import sys

import qwenrt

questions = ["What is the capital of Japan?", "3 + 4 = ?", "法国的首都是哪里？"]

model = sys.argv[1] if len(sys.argv) > 1 else "demo"
tokenizer = qwenrt.load_tokenizer(model)
prompts = [tokenizer.encode_chat([{"role": "user", "content": q}]) for q in questions]

with qwenrt.load(model) as llm:
    greedy = qwenrt.SamplingParams(temperature=0, max_tokens=48)
    for question, out in zip(questions, llm.generate(prompt_token_ids=prompts, sampling_params=greedy)):
        print(f"{question} -> {out.text}")
