"""Tools of the demo model's world: made-up weather, calculator, search and clock functions, and calls of them."""

# ruff: noqa: SIM905
from __future__ import annotations

import json
import random
from dataclasses import dataclass
from typing import Any

from qwenrt.demo import facts
from qwenrt.demo.names import sliced_word

# kind -> names, descriptions, arguments (name, description)
KINDS: dict[str, tuple[tuple[str, ...], tuple[str, ...], tuple[tuple[str, str], ...]]] = {
    "weather": (
        ("get_weather", "weather", "current_weather", "query_weather", "get_current_weather", "weather_now"),
        (
            "Get the current weather of a city.",
            "Get the weather.",
            "Look up today's weather in a place.",
            "查询城市的天气。",
            "Tells the weather in a city.",
        ),
        (
            ("city", "The name of the city"),
            ("location", "Where"),
            ("place", "A place"),
            ("city_name", "城市名称"),
        ),
    ),
    "calculator": (
        ("calculator", "calculate", "calc", "math", "compute"),
        (
            "Calculate an arithmetic expression.",
            "Do arithmetic.",
            "Compute the value of an expression.",
            "计算数学表达式。",
            "A calculator for numbers.",
        ),
        (
            ("expression", "The expression to compute"),
            ("expr", "An expression"),
            ("formula", "数学表达式"),
            ("input", "What to compute"),
        ),
    ),
    "search": (
        ("search", "web_search", "search_web", "google_search", "find_pages"),
        (
            "Search the web.",
            "Find pages on the web.",
            "Search for information.",
            "在网上搜索信息。",
            "Look something up on the web.",
        ),
        (
            ("query", "What to search for"),
            ("q", "The search text"),
            ("keywords", "搜索关键词"),
            ("text", "Text to look up"),
        ),
    ),
    "time": (
        ("get_time", "clock", "current_time", "time_now"),
        ("Get the time in a city.", "Tells what time it is.", "查询城市的时间。", "The clock of a place."),
        (
            ("city", "The name of the city"),
            ("location", "Where"),
            ("place", "A place"),
            ("timezone", "城市名称"),
        ),
    ),
}
# Names nobody could guess, so that the model learns to read them.
VARIED_ARGUMENTS = (
    "city town place location where region area target spot name text words phrase term topic subject q query key "
    "keywords question search_text expression expr formula input sum problem math equation value numbers timezone zone "
    "country address site position point data arg x y a b what item thing entry content message string param city_name"
).split()
_VARIED_FRONTS = (
    "get query find fetch my the do run show tell ask use call look check new our fast simple".split()
)
_VARIED_BACKS = {
    "weather": "weather temperature forecast sky rain sun wind".split(),
    "calculator": "math sum calculator numbers result value".split(),
    "search": "pages web search info facts news books".split(),
    "time": "time clock hour date watch".split(),
}
_WEATHER = (
    ("sunny", "晴"),
    ("cloudy", "多云"),
    ("rainy", "下雨"),
    ("windy", "刮风"),
    ("snowy", "下雪"),
    ("foggy", "有雾"),
)


@dataclass(frozen=True)
class Call:
    """One question that needs a tool: what to ask about, the argument, what the tool says, the final answer."""

    subject: str
    argument: str
    observation: str
    answer: str


def varied_tool(rng: random.Random, kind: str) -> tuple[str, str]:
    """The names of a tool and of its argument, at most one of them from KINDS, the others plausible or made up."""
    front, back = rng.choice(_VARIED_FRONTS), rng.choice(_VARIED_BACKS[kind])
    made_up = f"{sliced_word(rng)}_{rng.choice((back, sliced_word(rng)))}"
    name = rng.choice((f"{front}_{back}", made_up, rng.choice(KINDS[kind][0])))
    return name, rng.choice((rng.choice(VARIED_ARGUMENTS), rng.choice(VARIED_ARGUMENTS), sliced_word(rng)))


def make_tool(rng: random.Random, kind: str, name: str, argument: tuple[str, str]) -> dict[str, Any]:
    """An OpenAI-style tool of one required string argument."""
    schema: dict[str, Any] = {"type": "string"}
    if rng.random() < 0.6:
        schema["description"] = argument[1]
    parameters: dict[str, Any] = {"type": "object", "properties": {argument[0]: schema}}
    if rng.random() < 0.7:
        parameters["required"] = [argument[0]]
    function = {"name": name, "description": rng.choice(KINDS[kind][1]), "parameters": parameters}
    return {"type": "function", "function": function}


def make_call(rng: random.Random, kind: str, lang: str) -> Call:
    """Something to ask a tool of this kind, with numbers of its own."""
    zh = lang == "zh"
    place = rng.choice(facts.CAPITALS)
    city = place[3] if zh else place[1]
    if kind == "weather":
        sky, degrees = rng.choice(_WEATHER)[zh], rng.randrange(100)
        report = f"{sky}，{degrees}度" if zh else f"{sky}, {degrees} degrees"
        answer = f"{city}的天气：{report}。" if zh else f"The weather in {city}: {report}."
        if rng.random() < 0.3:
            report = json.dumps({"weather": sky, "temperature": degrees}, ensure_ascii=False)
        return Call(city, city, report, answer)
    if kind == "time":
        clock = f"{rng.randrange(24)}:{rng.randrange(60):02d}"
        return Call(city, city, clock, f"{city}现在是{clock}。" if zh else f"It is {clock} in {city}.")
    if kind == "calculator":
        sign = rng.choice("+-*/")
        a, b = rng.randrange(100, 1000), rng.randrange(100, 1000)
        expression = f"{a} {sign} {b}" if rng.random() < 0.7 else f"{a}{sign}{b}"
        value = {"+": a + b, "-": a - b, "*": a * b, "/": round(a / b, 2)}[sign]
        return Call(expression, expression, str(value), f"{expression} = {value}{'。' if zh else '.'}")
    animal, topic = rng.choice(facts.ANIMALS), rng.randrange(4)
    subject = (
        (f"{place[2]}的历史", f"{place[2]}的美食", f"怎么画{animal[1]}", f"{animal[1]}的生活")
        if zh
        else (
            f"the history of {place[0]}",
            f"the food of {place[0]}",
            f"how to draw a {animal[0]}",
            f"the life of a {animal[0]}",
        )
    )[topic]
    year = rng.randrange(1900, 2030)
    page = f"关于{subject}的一本书，{year}年" if zh else f"a book on {subject}, {year}"
    return Call(subject, subject, page, f"我找到了：{page}。" if zh else f"I found this: {page}.")


def arguments(name: str, value: str) -> str:
    """The argument object as the model writes it."""
    return json.dumps({name: value}, ensure_ascii=False)
