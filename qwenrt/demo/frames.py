"""Phrasings made of a frame and a clause, to train on: what is read in many forms is understood in forms never read.

No phrasing made here is one of the test's, and none is one of those in ASK, whose use is held out key by key."""

from __future__ import annotations

from functools import cache

from qwenrt.demo.phrasings import ASK, SMALL_TALK, SYSTEMS

FRAMES = {
    "en": (
        "Tell me {}.",
        "Please tell me {}.",
        "Can you tell me {}?",
        "Could you tell me {}?",
        "Can you say {}?",
        "Do you know {}?",
        "Do you happen to know {}?",
        "I want to know {}.",
        "I would like to know {}.",
        "I wonder {}.",
        "Say {}.",
    ),
    "zh": (
        "{}？",
        "请问{}？",
        "告诉我{}。",
        "请告诉我{}。",
        "你知道{}吗？",
        "你知不知道{}？",
        "我想知道{}。",
        "能告诉我{}吗？",
        "请说说{}。",
    ),
}
CLAUSES: dict[tuple[str, str], tuple[str, ...]] = {
    ("capital", "en"): (
        "the capital of {x}",
        "the capital city of {x}",
        "what the capital of {x} is",
        "what the capital city of {x} is",
        "which city is the capital of {x}",
        "{x}'s capital",
        "what {x}'s capital is called",
    ),
    ("capital", "zh"): (
        "{x}的首都",
        "{x}的首都是哪里",
        "{x}首都是哪座城市",
        "{x}的首都叫什么",
        "{x}的首都是什么",
    ),
    ("legs", "en"): ("how many legs {x} has", "the number of legs of {x}", "how many legs there are on {x}"),
    ("legs", "zh"): ("{x}有几条腿", "{x}有多少条腿", "{x}的腿有几条", "{x}长了多少条腿"),
    ("sound", "en"): (
        "what {x} says",
        "what sound {x} makes",
        "what noise {x} makes",
        "which sound {x} makes",
        "the sound of {x}",
        "the noise {x} makes",
    ),
    ("sound", "zh"): ("{x}怎么叫", "{x}是怎么叫的", "{x}的叫声", "{x}的叫声是什么", "{x}发出什么声音"),
    ("food", "en"): ("what {x} eats", "what food {x} eats", "what {x} likes to eat", "the food of {x}"),
    ("food", "zh"): ("{x}吃什么", "{x}爱吃什么", "{x}喜欢吃什么", "{x}的食物", "{x}的食物是什么"),
    ("home", "en"): (
        "where {x} lives",
        "where I can find {x}",
        "where the home of {x} is",
        "the home of {x}",
    ),
    ("home", "zh"): ("{x}住在哪里", "{x}的家在哪里", "{x}住在什么地方", "在哪里能找到{x}"),
    ("colour", "en"): (
        "the colour of {x}",
        "the color of {x}",
        "what colour {x} is",
        "what color {x} is",
        "which colour {x} is",
    ),
    ("colour", "zh"): ("{x}是什么颜色", "{x}是哪种颜色", "{x}的颜色", "{x}的颜色是什么"),
    ("+", "en"): ("the sum of {a} and {b}", "how much {a} + {b} is", "what {a} plus {b} is", "{a} + {b}"),
    ("+", "zh"): ("{a}加{b}是多少", "{a}+{b}是几", "{a}加上{b}等于多少", "{a}与{b}的和"),
    ("-", "en"): ("how much {a} - {b} is", "what {a} minus {b} is", "{a} minus {b}", "{a} - {b}"),
    ("-", "zh"): ("{a}减{b}是多少", "{a}-{b}是几", "{a}减去{b}等于多少", "{a}减{b}的结果"),
    ("*", "en"): ("how much {a} * {b} is", "what {a} times {b} is", "{a} times {b}", "{a} * {b}"),
    ("*", "zh"): ("{a}乘{b}是多少", "{a}*{b}是几", "{a}乘以{b}等于几", "{a}乘{b}的结果"),
    ("ask_name", "en"): ("my name", "what my name is", "who I am", "what I am called", "how I am called"),
    ("ask_name", "zh"): (
        "我的名字",
        "我叫什么",
        "我叫什么名字",
        "我的名字是什么",
        "我是谁",
        "我的名字叫什么",
    ),
    ("ask_colour", "en"): (
        "my favourite colour",
        "my favorite color",
        "what my favourite colour is",
        "which colour I like best",
        "what colour I love most",
        "which colour is my favourite",
    ),
    ("ask_colour", "zh"): (
        "我最喜欢的颜色",
        "我最喜欢什么颜色",
        "我喜欢哪种颜色",
        "我最爱什么颜色",
        "我最爱的颜色是什么",
    ),
    ("ask_pet", "en"): (
        "the name of my pet",
        "my pet's name",
        "what my pet is called",
        "how my pet is called",
    ),
    ("ask_pet", "zh"): ("我的宠物叫什么", "我的宠物叫什么名字", "我的宠物的名字", "我的宠物的名字叫什么"),
    ("persona", "en"): ("your name", "who you are", "what your name is", "your name and your job"),
    ("persona", "zh"): ("你是谁", "你叫什么", "你叫什么名字", "你的名字", "你的名字是什么"),
    ("weather", "en"): ("the weather in {x}", "how the weather is in {x}", "what the weather is like in {x}"),
    ("weather", "zh"): ("{x}的天气", "{x}的天气怎么样", "{x}今天天气如何", "{x}今天是什么天气"),
    ("time", "en"): ("the time in {x}", "what time it is in {x}", "what the time is in {x} now"),
    ("time", "zh"): ("{x}几点了", "{x}现在几点", "{x}的时间", "{x}现在是什么时间"),
    ("calculator", "en"): ("the result of {x}", "what {x} is", "how much {x} is", "{x}"),
    ("calculator", "zh"): ("{x}等于多少", "{x}的结果", "{x}是多少", "{x}等于几"),
}
# Of what was said before one asks in these ways as well.
_REMEMBERING = {
    "en": ("Do you remember {}?", "Do you still know {}?", "I forgot {}."),
    "zh": ("你记得{}吗？", "你还记得{}吗？", "我忘了{}。"),
}
# Whole phrasings of what has no clause.
_WHOLE: dict[tuple[str, str], tuple[str, ...]] = {
    ("tell_name", "en"): (
        "Hello! I am {x}.",
        "Hey, my name is {x}.",
        "Hi! My name is {x}.",
        "I am called {x}.",
        "People call me {x}.",
        "Hi, call me {x}.",
        "Hello, I am called {x}.",
        "Nice to meet you, I am {x}.",
    ),
    ("tell_name", "zh"): (
        "嗨，我是{x}。",
        "你好！我的名字是{x}。",
        "叫我{x}吧。",
        "你好，请叫我{x}。",
        "我的名字就是{x}。",
    ),
    ("tell_colour", "en"): (
        "I like {x}, it is my favorite color.",
        "My favourite is the colour {x}.",
        "Of all colours I love {x} most.",
        "I love {x} best.",
        "The color I like best is {x}.",
    ),
    ("tell_colour", "zh"): (
        "我爱的颜色是{x}。",
        "我最爱的是{x}。",
        "我非常喜欢{x}。",
        "{x}是我最喜欢的颜色。",
    ),
    ("tell_pet", "en"): (
        "I have {x}, its name is {y}.",
        "My pet, {x}, is named {y}.",
        "We have {x}, it is called {y}.",
    ),
    ("tell_pet", "zh"): ("我有一只{x}，名字叫{y}。", "我养的{x}叫{y}。", "我的宠物是{x}，叫{y}。"),
    ("search", "en"): (
        "Search the web for {x}.",
        "Please look up {x}.",
        "Can you find something about {x}?",
        "Find {x}.",
    ),
    ("search", "zh"): ("搜一下{x}。", "请帮我搜索{x}。", "查一下{x}。", "请在网上查{x}。"),
}
SYSTEM_FRAMES = {
    "en": (
        "{}.",
        "Please {}.",
        "Always {}.",
        "Please always {}.",
        "You must {}.",
        "You must always {}.",
        "You should {}.",
        "From now on, {}.",
        "I want you to {}.",
        "In this conversation, {}.",
    ),
    "zh": (
        "{}。",
        "请{}。",
        "请总是{}。",
        "总是{}。",
        "你要{}。",
        "你必须{}。",
        "从现在起，{}。",
        "请你{}。",
    ),
}
SYSTEM_CLAUSES: dict[tuple[str, str], tuple[str, ...]] = {
    ("pirate", "en"): ("talk like a pirate", "answer like a pirate", "speak like a pirate", "be a pirate"),
    ("pirate", "zh"): ("像海盗一样说话", "像海盗一样回答", "像海盗那样说话", "学海盗说话"),
    ("caps", "en"): (
        "answer in capital letters",
        "use only capital letters",
        "write everything in capital letters",
        "write in capital letters",
        "answer in upper case",
        "write in upper case",
        "use upper case",
        "write your answers in upper case",
    ),
    ("caps", "zh"): ("用大写字母回答", "只用大写字母", "用大写字母写"),
    ("chinese", "en"): ("answer in Chinese", "speak Chinese", "write in Chinese", "use only Chinese"),
    ("chinese", "zh"): ("用中文回答", "说中文", "只说中文", "用中文说话"),
    ("english", "en"): ("answer in English", "speak English", "write in English", "use only English"),
    ("english", "zh"): ("用英文回答", "说英文", "只说英文", "用英文说话"),
    ("one_word", "en"): (
        "answer with one word",
        "answer in one word only",
        "use one word",
        "use one word only",
        "give one-word answers",
        "answer with a single word",
        "reply with one word only",
    ),
    ("one_word", "zh"): ("用一个词回答", "只用一个词回答", "只说一个词", "用一个词"),
    ("thanks", "en"): (
        "say thank you at the end",
        "end every answer with: Thank you!",
        "finish each answer with: Thank you!",
        "say thank you at the end of each answer",
        "say thank you after every answer",
    ),
}  # fmt: skip


@cache
def _kept() -> frozenset[str]:
    """Phrasings that must not be made here."""
    asked = [p for both in ASK.values() for p in (*both[0], *both[1])]
    tested = [
        p for test in (*(s[1] for s in SMALL_TALK.values()), *(s[1] for s in SYSTEMS.values())) for p in test
    ]
    return frozenset([*asked, *tested])


@cache
def composed(intent: str, lang: str) -> tuple[str, ...]:
    """All phrasings of an intent that a frame and a clause make."""
    frames = FRAMES[lang] + (_REMEMBERING[lang] if intent.startswith("ask_") else ())
    made = [*_WHOLE.get((intent, lang), ())]
    for clause in CLAUSES.get((intent, lang), ()):
        made += [frame.replace("{}", clause) for frame in frames]
    return tuple(p for p in dict.fromkeys(made) if p not in _kept())


@cache
def composed_systems(kind: str) -> tuple[str, ...]:
    """All system prompts of a kind that a frame and a clause make."""
    made = []
    for lang, frames in SYSTEM_FRAMES.items():
        for clause in SYSTEM_CLAUSES.get((kind, lang), ()):
            for frame in frames:
                prompt = frame.replace("{}", clause)
                prompt = prompt[0].upper() + prompt[1:]
                made.append(prompt.removesuffix(".") if clause.endswith("!") else prompt)
    return tuple(p for p in dict.fromkeys(made) if p not in _kept())
