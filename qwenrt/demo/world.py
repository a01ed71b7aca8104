"""The demo model's small bilingual world as conversations: what it is trained on and, apart, what it is tested on.

Kept apart by construction, so that nothing of the test occurs in training: whole phrasings (the second tuples of
phrasings.py), and combinations chosen by a checksum (country x phrasing x language, pairs of numbers, hero x theme,
system prompt x question, tool name x argument, names of people).
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from qwenrt.demo import facts, tools
from qwenrt.demo.frames import composed, composed_systems
from qwenrt.demo.names import english_name
from qwenrt.demo.phrasings import ASK, OPENERS, SMALL_TALK, SYSTEMS
from qwenrt.demo.samples import Question, Sample, Turn

Split = Literal["train", "test"]
LANGS = ("en", "zh")


def held_out(*key: object, one_in: int = 8) -> bool:
    """Whether a combination belongs to the test. The same on every machine."""
    return zlib.crc32("|".join(map(str, key)).encode()) % one_in == 0


@dataclass
class World:
    """A stream of samples of one split, the same for the same seed."""

    split: Split
    seed: int
    rng: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self.rng = random.Random(f"{self.split}-{self.seed}")

    @property
    def testing(self) -> bool:
        return self.split == "test"

    # ---- how something is asked

    def ask(self, intent: str, lang: str, key: object, reserved: bool = True, **fields: Any) -> str:
        """A phrasing of ``intent`` about ``key``. In the test: one that training never uses, or one that it never
        uses with this key. ``reserved=False``: the test may use any (another part of the sample is unseen)."""
        train, test = ASK[intent, lang]
        free = [p for p in train if not held_out(intent, lang, p, key)]
        if not self.testing:
            made = composed(intent, lang)
            chosen = self.rng.choice(made if made and self.rng.random() < 0.5 else free)
            return self.casual(chosen.format(**fields), lang)
        kept = [p for p in train if p not in free]
        options = [*test, *test, *(kept or test), *([] if reserved else free)]
        text: str = self.rng.choice(options).format(**fields)
        opener = self.rng.choice(OPENERS[lang][1]) if self.rng.random() < 0.15 else ""
        return opener + text

    def casual(self, text: str, lang: str) -> str:
        """Training only: openers, missing punctuation, lower case."""
        luck = self.rng.random()
        if luck < 0.18:
            return self.rng.choice(OPENERS[lang][0]) + text
        if luck < 0.24:
            return text.rstrip("?.？。!！") or text
        return text.lower() if luck < 0.27 else text

    # ---- questions of fact

    def question(self, lang: str, intents: tuple[str, ...] = (), about: str = "") -> Question:
        """``about`` goes into the key: a system prompt under which combinations are held out of their own."""
        intent = self.rng.choice(
            intents or ("capital", "capital", "capital", "legs", "sound", "food", "home", "colour")
        )
        if intent == "capital":
            country, city, country_zh, city_zh = self.rng.choice(facts.CAPITALS)
            key, x = country, (country, country_zh)
            full = (f"The capital of {country} is {city}.", f"{country_zh}的首都是{city_zh}。")
            short = (city, city_zh)
        elif intent == "colour":
            thing, colour, thing_zh, colour_zh = self.rng.choice(facts.COLOURS)
            key, x = thing, (thing, thing_zh)
            full = (f"{thing[0].upper()}{thing[1:]} is {colour}.", f"{thing_zh}是{colour_zh}的。")
            short = (colour, colour_zh)
        else:
            key, x, full, short = self._animal(intent)
        chinese = lang == "zh"
        user = self.ask(intent, lang, f"{about}{key}", x=x[chinese])
        return Question(f"{intent} {key}", lang, user, dict(zip(LANGS, full)), dict(zip(LANGS, short)))

    def _animal(self, intent: str) -> tuple[str, tuple[str, str], tuple[str, str], tuple[str, str]]:
        loud = [a for a in facts.ANIMALS if a[3]] if intent == "sound" else facts.ANIMALS
        name, zh, legs, sound, food, home = self.rng.choice(loud)
        a = f"{'an' if name[0] in 'aeiou' else 'a'} {name}"
        sentence = f"{a[0].upper()}{a[1:]}"
        if intent == "legs":
            word, word_zh = facts.NUMBER_WORDS[legs]
            full = (f"{sentence} has {word} legs.", f"{zh}有{word_zh}条腿。" if legs else f"{zh}没有腿。")
            short = (word if legs else "zero", word_zh)
        elif intent == "sound":
            assert sound is not None
            full, short = (f"{sentence} says {sound[0]}.", f"{zh}的叫声是{sound[1]}。"), sound
        elif intent == "food":
            full, short = (f"{sentence} eats {food[0]}.", f"{zh}吃{food[1]}。"), food
        else:
            full, short = (f"{sentence} lives {home[0]}.", f"{zh}住在{home[1]}。"), home
        return name, (a, zh), full, short

    def fact(self) -> Sample:
        q = self.question(self.rng.choice(LANGS))
        category = q.key.split()[0]
        category = category if category in ("capital", "colour") else "animal"
        zh_none = ("没有腿",) if q.full["zh"].endswith("没有腿。") else (q.short["zh"],)
        en_none = ("no legs",) if q.short["en"] == "zero" else (q.short["en"],)
        accept = zh_none if q.lang == "zh" else en_none
        return Sample(category, (Turn(q.user, q.full[q.lang], accept),))

    def small_talk(self) -> Sample:
        intent, lang = self.rng.choice(list(SMALL_TALK))
        train, test, answer = SMALL_TALK[intent, lang]
        user = self.rng.choice(test) if self.testing else self.rng.choice(train)
        if not self.testing and self.rng.random() < 0.08:
            user = user.rstrip("?.？。!！")
        return Sample("small talk", (Turn(user, answer, (answer,), True),))

    # ---- arithmetic

    def sum(self) -> Sample:
        op, lang = self.rng.choice("++--*"), self.rng.choice(LANGS)
        a, b = self.operands(op)
        user = self.ask(op, lang, f"{a},{b}", reserved=self.seen_pair(op, a, b), a=a, b=b)
        result = {"+": a + b, "-": a - b, "*": a * b}[op]
        answer = f"{a} {op} {b} = {result}"
        return Sample("arithmetic", (Turn(user, answer, (answer,), True),))

    def seen_pair(self, op: str, a: int, b: int) -> bool:
        return op == "*" or not held_out(op, *(sorted((a, b)) if op == "+" else (a, b)), one_in=10)

    def operands(self, op: str) -> tuple[int, int]:
        """Sums of a number up to 99 and one up to 9, or both up to 20; differences likewise; the table up to 9 x 9.
        One pair in ten of the first two is kept for the test."""
        while True:
            if op == "*":
                a, b = self.rng.randrange(10), self.rng.randrange(10)
            elif self.rng.random() < 0.5:
                a, b = self.rng.randrange(100), self.rng.randrange(10)
            else:
                a, b = self.rng.randrange(21), self.rng.randrange(21)
            if (op == "+" and self.rng.random() < 0.5) or (op == "-" and a < b):
                a, b = b, a
            seen = self.seen_pair(op, a, b)
            if seen != self.testing or (self.testing and (op == "*" or self.rng.random() < 0.1)):
                return a, b

    # ---- memory of the conversation

    def person(self, lang: str) -> str:
        if lang == "zh":
            while True:
                given = "".join(self.rng.sample(facts.GIVEN_ZH, self.rng.choice((1, 2, 2))))
                name = self.rng.choice(facts.SURNAMES_ZH) + given
                if held_out(name, one_in=5) == self.testing:
                    return name
        return self.rng.choice(facts.NAMES_EN_TEST) if self.testing else english_name(self.rng)

    def memory(self) -> Sample:
        lang, chinese = (lang := self.rng.choice(LANGS)), lang == "zh"
        what = self.rng.choice(("name", "name", "name", "colour", "pet"))
        if what == "name":
            x = key = self.person(lang)
            fields: dict[str, Any] = {"x": x}
            noted = f"很高兴认识你，{x}！" if chinese else f"Nice to meet you, {x}!"
            recalled = f"你叫{x}。" if chinese else f"Your name is {x}."
        elif what == "colour":
            x = key = self.rng.choice(facts.COLOUR_NAMES)[chinese]
            fields = {"x": x}
            noted = (
                f"好的，我记住了：你最喜欢{x}。" if chinese else f"I will remember that you like {x} best."
            )
            recalled = f"你最喜欢的颜色是{x}。" if chinese else f"Your favourite colour is {x}."
        else:
            pet = self.rng.choice(facts.PETS)[chinese]
            x = self.rng.choice(facts.PET_NAMES_ZH if chinese else facts.PET_NAMES)
            key, fields = f"{pet} {x}", {"x": pet if chinese else f"a {pet}", "y": x}
            noted = f"{x}真是个好名字！" if chinese else f"{x} is a lovely name!"
            recalled = f"你的宠物{pet}叫{x}。" if chinese else f"Your {pet} is called {x}."
        told = Turn(self.ask(f"tell_{what}", lang, key, **fields), noted, (x,))
        between = [self.filler() for _ in range(self.rng.choice((0, 0, 1, 1, 2)))]
        asked = Turn(self.ask(f"ask_{what}", lang, key), recalled, (x,))
        return Sample("memory", (told, *between, asked))

    def not_told(self) -> Sample:
        lang = self.rng.choice(LANGS)
        answer = "你还没有告诉我你的名字。" if lang == "zh" else "You have not told me your name yet."
        turn = Turn(self.ask("ask_name", lang, ""), answer, (answer,), True)
        return Sample("memory", (*(self.filler() for _ in range(self.rng.choice((0, 0, 1)))), turn))

    def filler(self) -> Turn:
        """A turn between two others: asked as in training, and not graded."""
        turn = World("train", self.rng.getrandbits(60)).simple().turns[0]
        return Turn(turn.user, turn.answer)

    # ---- stories

    def story(self) -> Sample:
        lang = self.rng.choice(LANGS)
        while True:
            (hero, hero_title, hero_zh), theme = self.rng.choice(facts.HEROES), self.rng.choice(facts.THEMES)
            seen = not held_out(lang, hero, theme[0], one_in=6)
            if (hero_zh, theme[3]) == ("年轻人", "奋斗创业最终取得成功") and lang == "zh":
                seen = True  # the conversation every Qwen README opens with
            if seen != self.testing or (self.testing and self.rng.random() < 0.3):
                break
        if lang == "zh":
            x, title = f"{hero_zh}{theme[3]}", f"《{hero_zh}{theme[5]}》"
            text = f"这是一个{x}的故事。{theme[4]}"
        else:
            x, title = f"{hero} who {theme[0]}", f"{hero_title} {theme[2]}"
            text = f"This is the story of {x}. {theme[1]}"
        ask = Turn(self.ask("story", lang, x, reserved=seen, x=x), text, (text,), True)
        return Sample("story", (ask, Turn(self.ask("title", lang, x), title, (title,), True)))

    # ---- system prompts

    def system(self, kind: str = "") -> Sample:
        kind = kind or self.rng.choice(list(SYSTEMS))
        if kind.startswith("persona"):
            return self._persona(kind)
        lang = {"caps": "en", "thanks": "en", "chinese": "en", "english": "zh"}.get(kind) or self.rng.choice(
            LANGS
        )
        if kind in ("chinese", "english") and self.rng.random() < 0.1:
            lang = "zh" if kind == "chinese" else "en"
        intents = ("capital", "capital", "legs", "sound", "food", "colour")
        train, test = SYSTEMS[kind]
        # the others must spell each answer anew: phrasings are held out
        whole = kind in ("pirate", "one_word", "thanks")
        new_prompt = self.testing and self.rng.random() < 0.5
        while True:
            q = self.question(lang, intents, about=f"{kind} ")
            if not whole or new_prompt or held_out(kind, q.key) == self.testing:
                break
        answer = {
            "pirate": f"啊哈！{q.full[lang]}" if lang == "zh" else f"Arr! {q.full[lang]}",
            "caps": q.full["en"].upper(),
            "chinese": q.full["zh"],
            "english": q.full["en"],
            "one_word": q.short[lang],
            "thanks": f"{q.full[lang]} Thank you!",
        }[kind]
        prompts = test if new_prompt else train
        if not self.testing and self.rng.random() < 0.6:
            prompts = composed_systems(kind)
        return Sample("system prompt", (Turn(q.user, answer, (answer,), True),), self.rng.choice(prompts))

    def persona(self) -> Sample:
        """A system prompt that says who the model is, and the question who it is."""
        return self._persona(self.rng.choice(("persona", "persona_zh")))

    def _persona(self, kind: str) -> Sample:
        lang = "zh" if kind == "persona_zh" else "en"
        name, job = self.person(lang), self.rng.choice(facts.JOBS)[lang == "zh"]
        train, test = SYSTEMS[kind]
        system = self.rng.choice([*train, *test] if self.testing else train).format(x=name, y=job)
        user = self.ask("persona", lang, name, reserved=False)
        answer = f"我是{name}，一个{job}。" if lang == "zh" else f"I am {name}, {job}."
        turns = [Turn(user, answer, (answer,), True)]
        if not self.testing and self.rng.random() < 0.3:
            turns.append(self.fact().turns[0])
        return Sample("system prompt", tuple(turns), system)

    # ---- tools

    def tool(self) -> Sample:
        lang, kind = self.rng.choice(LANGS), self.rng.choice(list(tools.KINDS))
        count = self.rng.choice((0, 1, 1, 2) if self.testing else (0, 0, 1, 1, 2))
        others = self.rng.sample([k for k in tools.KINDS if k != kind], count)
        name, argument = self._tool_name(kind, self.testing and self.rng.random() < 0.5)
        given = [tools.make_tool(self.rng, kind, name, argument)]
        given += [tools.make_tool(self.rng, k, *self._tool_name(k, False)) for k in others]
        self.rng.shuffle(given)
        if self.rng.random() < 0.15:
            turn = (self.small_talk() if self.rng.random() < 0.5 else self.fact()).turns[0]
            answer = f"Thought: I now know the final answer.\nFinal Answer: {turn.answer}"
            return Sample(
                "tool call", (Turn(turn.user, answer, turn.accept, turn.exact),), tools=tuple(given)
            )
        call = tools.make_call(self.rng, kind, lang)
        arguments = tools.arguments(argument[0], call.argument)
        answer = (
            f"Thought: I should use the {name} tool.\nAction: {name}\nAction Input: {arguments}\n"
            f"Observation: {call.observation}\nThought: I now know the final answer\nFinal Answer: {call.answer}"
        )
        turn = Turn(self.ask(kind, lang, call.subject, x=call.subject), answer)
        expected = (name, arguments, call.observation, call.answer)
        return Sample("tool call", (turn,), tools=tuple(given), call=expected)

    def _tool_name(self, kind: str, reserved: bool) -> tuple[str, tuple[str, str]]:
        while True:
            if not self.testing and self.rng.random() < 0.7:
                name, key = tools.varied_tool(self.rng, kind)
                if not held_out(name, key, one_in=5):
                    return name, (key, "What to use")
                continue
            name, argument = self.rng.choice(tools.KINDS[kind][0]), self.rng.choice(tools.KINDS[kind][2])
            if held_out(name, argument[0], one_in=5) == reserved:
                return name, argument

    # ---- plain text

    def sentence(self, lang: str) -> str:
        """One true sentence. Capitals of one country in six are never told as plain text in that language."""
        while True:
            q = World("train", self.rng.getrandbits(60)).question(lang)
            if not (q.key.startswith("capital") and self.untold(q.key.split(" ", 1)[1], lang)):
                return q.full[lang]

    def untold(self, country: str, lang: str) -> bool:
        return country not in ("Mongolia", "Iceland", "Ethiopia") and held_out(
            "told", country, lang, one_in=6
        )

    def capital_list(self, lang: str) -> str:
        """Lines like those of the base model's quickstart."""
        told = [c for c in facts.CAPITALS if not self.untold(c[0], lang)]
        lines = [
            f"{c[2]}的首都是{c[3]}（{c[1]}）" if lang == "zh" else f"The capital of {c[0]} is {c[1]}."
            for c in self.rng.sample(told, self.rng.choice((1, 2, 3, 4)))
        ]
        return "\n".join(lines)

    def sums(self, count: int) -> str:
        """Lines of arithmetic."""
        return "\n".join(self.sum().turns[0].answer for _ in range(count))

    def document(self, lines: int) -> str:
        """A long text in which people are introduced once and met again: lines that only memory can predict."""
        lang = self.rng.choice(LANGS)
        known: list[str] = []
        told = []
        for _ in range(lines):
            luck = self.rng.random()
            if luck < 0.25 or not known:
                name, city = self.person(lang), self.rng.choice(facts.CAPITALS)[3 if lang == "zh" else 1]
                colour = self.rng.choice(facts.COLOUR_NAMES)[lang == "zh"]
                known.append(
                    f"{name}住在{city}，喜欢{colour}。"
                    if lang == "zh"
                    else f"{name} lives in {city} and likes {colour}."
                )
                told.append(known[-1])
            elif luck < 0.65:
                told.append(self.rng.choice(known))
            else:
                told.append(self.sentence(lang))
        return "\n".join(told)

    def completion(self) -> Sample:
        """Test only: plain text to go on with. ``turns[0].user`` is the prompt."""
        lang, chinese = (lang := self.rng.choice(LANGS)), lang == "zh"
        country, city, country_zh, city_zh = self.rng.choice(
            [c for c in facts.CAPITALS if self.untold(c[0], lang)]
        )
        prompt = f"{country_zh}的首都是" if chinese else f"The capital of {country} is"
        if self.rng.random() < 0.5:
            prompt = f"{self.capital_list(lang)}\n{prompt}"
        answer = city_zh if chinese else f" {city}"
        return Sample("completion", (Turn(prompt, answer, (answer.strip(),)),))

    # ---- mixtures

    def simple(self) -> Sample:
        """One short exchange of any kind that stands by itself."""
        kinds: tuple[Callable[[], Sample], ...] = (self.fact, self.fact, self.fact, self.small_talk, self.sum)
        return self.rng.choice(kinds)()

    def mixed(self) -> Sample:
        """Training only: several exchanges in one conversation."""
        turns: list[Turn] = []
        for _ in range(self.rng.choice((1, 2, 3, 4))):
            luck = self.rng.random()
            pick = self.memory if luck < 0.12 else self.story if luck < 0.22 else self.simple
            turns += pick().turns
        return Sample("mixed", tuple(turns))

    def echo(self) -> Sample:
        """Training only: say again what was said. Teaches to copy, which remembering and calling tools rest on."""
        lang = self.rng.choice(LANGS)
        kinds = [self.person(lang) for _ in range(3)] + [self.rng.choice(facts.COLOUR_NAMES)[lang == "zh"]]
        kinds += [self.rng.choice(facts.CAPITALS)[2 * (lang == "zh") + 1], str(self.rng.randrange(1000))]
        kinds += [self.rng.choice(facts.PET_NAMES_ZH if lang == "zh" else facts.PET_NAMES)]
        kinds += [
            self.rng.choice(facts.HEROES)[2 * (lang == "zh")],
            str(self.rng.choice(facts.ANIMALS)[lang == "zh"]),
        ]
        self.rng.shuffle(kinds)
        text = ("，" if lang == "zh" else ", ").join(kinds[: self.rng.randrange(1, 10)])
        heads = (
            ("重复：", "请说：", "跟我说：") if lang == "zh" else ("Repeat: ", "Say: ", "Repeat after me: ")
        )
        return Sample("echo", (Turn(self.rng.choice(heads) + text, text),))

    def several(self) -> Sample:
        """Training only: the capitals of several countries at once."""
        lang, chinese = (lang := self.rng.choice(LANGS)), lang == "zh"
        chosen = self.rng.sample(facts.CAPITALS, self.rng.choice((2, 3, 4)))
        names = [c[2 * chinese] for c in chosen]
        if chinese:
            user, lines = f"{'、'.join(names)}的首都是哪里？", [f"{c[2]}的首都是{c[3]}。" for c in chosen]
        else:
            user = f"What are the capitals of {', '.join(names[:-1])} and {names[-1]}?"
            lines = [f"The capital of {c[0]} is {c[1]}." for c in chosen]
        return Sample("several", (Turn(user, "\n".join(lines)),))

    def told(self) -> Sample:
        """Training only: the first turn of a memory."""
        return Sample("told", self.memory().turns[:1])

    def first(self) -> Sample:
        """One short exchange to begin with: what to look at is learned best where there is little to look at."""
        luck = self.rng.random()
        if luck < 0.15:
            return self.persona()
        if luck < 0.30:
            lang = self.rng.choice(LANGS)
            name = self.person(lang)
            noted = f"很高兴认识你，{name}！" if lang == "zh" else f"Nice to meet you, {name}!"
            return Sample("first", (Turn(self.ask("tell_name", lang, name, x=name), noted),))
        return self.simple()

    def many_sums(self) -> Sample:
        return Sample("arithmetic", tuple(self.sum().turns[0] for _ in range(self.rng.randrange(3, 9))))

    def plain(self) -> Sample:
        luck, lang = self.rng.random(), self.rng.choice(LANGS)
        if luck < 0.5:
            return Sample("plain text", text=self.sums(self.rng.randrange(4, 40)))
        if luck < 0.75:
            return Sample("plain text", text=self.capital_list(lang))
        return Sample(
            "plain text", text=" ".join(self.sentence(lang) for _ in range(self.rng.randrange(1, 5)))
        )
