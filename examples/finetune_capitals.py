"""Conversations to train the built-in model on: it knows capitals, and is to say them in another form.

    python examples/finetune_capitals.py capitals      # writes capitals/train.jsonl and capitals/held_out.jsonl

28 countries are for training, 12 for looking whether the form was learned and not the answers; a fifth of what is
trained on is the model's own talk, so that it keeps what it can do. docs/finetuning.md goes on from here.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
from pathlib import Path

from qwenrt.demo.corpus import training_samples
from qwenrt.demo.facts import CAPITALS

QUESTIONS = ("What is the capital of {}?", "Tell me the capital of {}.", "Which city is the capital of {}?")
HELD_OUT = 12  # countries


def answer(country: str, capital: str, form: str) -> str:
    if form == "json":
        return json.dumps({"answer": f"The capital of {country} is {capital}."})
    return f"country: {country}, capital: {capital}"


def talks(countries: list[tuple[str, str, str, str]], form: str) -> list[dict[str, object]]:
    return [
        {
            "messages": [
                {"role": "user", "content": question.format(country)},
                {"role": "assistant", "content": answer(country, capital, form)},
            ]
        }
        for country, capital, _, _ in countries
        for question in QUESTIONS
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--form", choices=("plain", "json"), default="plain", help="of the answers")
    parser.add_argument("--own-talk", type=float, default=0.2, help="share of the model's own talk")
    args = parser.parse_args()
    countries = list(CAPITALS)
    random.Random(0).shuffle(countries)
    train = talks(countries[HELD_OUT:], args.form)
    own = round(len(train) * args.own_talk / (1 - args.own_talk))
    train += [sample.entry() for sample in itertools.islice(training_samples(77), own)]
    args.out.mkdir(parents=True, exist_ok=True)
    for name, entries in (("train", train), ("held_out", talks(countries[:HELD_OUT], args.form))):
        lines = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
        (args.out / f"{name}.jsonl").write_text(lines, encoding="utf-8")
        print(f"{args.out / name}.jsonl: {len(entries)} conversations")


if __name__ == "__main__":
    main()
