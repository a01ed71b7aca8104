"""How people ask for stories, tell and ask about themselves, and ask what tools know. {x} is what is asked about."""

from __future__ import annotations

# (intent, language) -> (phrasings to train on, phrasings of the test)
TURNS: dict[tuple[str, str], tuple[tuple[str, ...], tuple[str, ...]]] = {
    ("story", "en"): (
        (
            "Tell me a story about {x}.",
            "Tell me a short story about {x}.",
            "Please write a story about {x}.",
            "Can you tell a story about {x}?",
            "I want to hear a story about {x}.",
            "Write a short story about {x}.",
            "A story about {x}, please.",
        ),
        (
            "Can you write a story about {x}?",
            "Please tell me a short story about {x}.",
            "I want a story about {x}.",
        ),
    ),
    ("story", "zh"): (
        (
            "给我讲一个{x}的故事。",
            "讲一个{x}的故事。",
            "请讲一个{x}的故事。",
            "写一个{x}的小故事。",
            "我想听一个{x}的故事。",
            "能给我讲一个{x}的故事吗？",
            "说一个{x}的故事吧。",
        ),
        ("请给我讲一个{x}的小故事。", "能写一个{x}的故事吗？", "给我写一个{x}的故事。"),
    ),
    ("title", "en"): (
        (
            "Give this story a title.",
            "What is a good title for this story?",
            "Find a title for the story.",
            "Now give it a title.",
            "Please write a title for this story.",
            "What title would you give it?",
            "Title, please.",
        ),
        (
            "Please give the story a title.",
            "What would be a good title for it?",
            "Write a title for the story.",
        ),
    ),
    ("title", "zh"): (
        (
            "给这个故事起一个标题",
            "给这个故事起一个标题。",
            "请给这个故事起个标题。",
            "这个故事叫什么标题好？",
            "给它起一个标题吧。",
            "写一个标题。",
            "这个故事的标题是什么？",
        ),
        ("给故事起个标题。", "请给它起一个标题。", "请写一个这个故事的标题。"),
    ),
    ("tell_name", "en"): (
        (
            "My name is {x}.",
            "I am {x}.",
            "I'm {x}.",
            "Hello, my name is {x}.",
            "Hi, I am {x}.",
            "Please call me {x}.",
            "You can call me {x}.",
            "They call me {x}.",
        ),
        ("Hi, my name is {x}.", "Hello, I'm {x}.", "Hello, you can call me {x}."),
    ),
    ("tell_name", "zh"): (
        (
            "我叫{x}。",
            "我的名字是{x}。",
            "你好，我叫{x}。",
            "我是{x}。",
            "请叫我{x}。",
            "大家叫我{x}。",
            "我的名字叫{x}。",
        ),
        ("你好，我是{x}。", "你好，我的名字叫{x}。", "你可以叫我{x}。"),
    ),
    ("ask_name", "en"): (
        (
            "What is my name?",
            "What's my name?",
            "Do you remember my name?",
            "Who am I?",
            "Tell me my name.",
            "What am I called?",
            "Do you know who I am?",
            "What was my name again?",
        ),
        ("Do you know my name?", "Can you tell me my name?", "Do you remember what my name is?"),
    ),
    ("ask_name", "zh"): (
        (
            "我叫什么名字？",
            "我叫什么？",
            "你还记得我的名字吗？",
            "我是谁？",
            "告诉我我的名字。",
            "我的名字是什么？",
            "你记得我叫什么吗？",
        ),
        ("你还记得我叫什么名字吗？", "请问我叫什么？", "你知道我的名字吗？"),
    ),
    ("tell_colour", "en"): (
        (
            "My favourite colour is {x}.",
            "My favorite color is {x}.",
            "I like the colour {x} best.",
            "The colour I like most is {x}.",
            "I love the colour {x}.",
        ),
        ("I love {x}, it is my favourite colour.", "The colour I love most is {x}."),
    ),
    ("tell_colour", "zh"): (
        ("我最喜欢的颜色是{x}。", "我最喜欢{x}。", "我喜欢的颜色是{x}。", "我爱{x}。"),
        ("我最爱的颜色是{x}。", "我最爱{x}。"),
    ),
    ("ask_colour", "en"): (
        (
            "What is my favourite colour?",
            "What's my favorite color?",
            "Which colour do I like best?",
            "Do you remember my favourite colour?",
            "Tell me my favourite colour.",
            "Which colour do I like most?",
        ),
        ("Which colour is my favourite?", "Do you know my favourite colour?", "What colour do I like best?"),
    ),
    ("ask_colour", "zh"): (
        (
            "我最喜欢什么颜色？",
            "我最喜欢的颜色是什么？",
            "你还记得我最喜欢的颜色吗？",
            "我喜欢哪种颜色？",
            "告诉我我最喜欢的颜色。",
        ),
        ("你记得我最喜欢什么颜色吗？", "我最喜欢哪种颜色？"),
    ),
    ("tell_pet", "en"): (
        (
            "I have {x} called {y}.",
            "I have {x} named {y}.",
            "My pet is {x} called {y}.",
            "{y} is the name of my pet, {x}.",
            "There is {x} called {y} in my house.",
            "We have {x} named {y}.",
        ),
        ("We have {x} called {y}.", "My pet is {x} named {y}."),
    ),
    ("tell_pet", "zh"): (
        (
            "我有一只{x}叫{y}。",
            "我养了一只{x}，名字叫{y}。",
            "我家有一只{x}，叫{y}。",
            "我的宠物是一只{x}，它叫{y}。",
        ),
        ("我养了一只{x}，叫{y}。", "我家有一只{x}，名字叫{y}。"),
    ),
    ("ask_pet", "en"): (
        (
            "What is my pet called?",
            "What is the name of my pet?",
            "What's my pet's name?",
            "Do you remember the name of my pet?",
            "Tell me the name of my pet.",
        ),
        ("Do you know the name of my pet?", "Do you remember what my pet is called?"),
    ),
    ("ask_pet", "zh"): (
        ("我的宠物叫什么？", "我的宠物叫什么名字？", "你还记得我的宠物叫什么吗？", "告诉我我的宠物的名字。"),
        ("你记得我的宠物的名字吗？", "我的宠物的名字是什么？"),
    ),
    ("persona", "en"): (
        (
            "Who are you?",
            "What is your name?",
            "Please introduce yourself.",
            "Tell me who you are.",
            "What's your name and what do you do?",
            "Hello, who are you?",
        ),
        ("Can you introduce yourself?", "Hi, who are you?", "Tell me your name."),
    ),
    ("persona", "zh"): (
        (
            "你是谁？",
            "你叫什么名字？",
            "请介绍一下你自己。",
            "告诉我你是谁。",
            "你好，你是谁？",
            "介绍一下自己。",
        ),
        ("请问你是谁？", "你好，请介绍一下自己。", "请问你叫什么名字？"),
    ),
    ("weather", "en"): (
        (
            "What is the weather in {x}?",
            "How is the weather in {x} today?",
            "Is it raining in {x}?",
            "Tell me the weather in {x}.",
            "What's the weather like in {x}?",
            "Do I need an umbrella in {x}?",
            "Weather in {x}?",
        ),
        (
            "Tell me the weather in {x} today.",
            "Do you know the weather in {x}?",
            "What is the weather like in {x} today?",
        ),
    ),
    ("weather", "zh"): (
        (
            "{x}的天气怎么样？",
            "{x}今天天气如何？",
            "{x}今天下雨吗？",
            "告诉我{x}的天气。",
            "请问{x}天气怎么样？",
            "{x}天气好吗？",
        ),
        ("请问{x}今天天气怎么样？", "你知道{x}的天气吗？", "{x}今天的天气怎么样？"),
    ),
    ("calculator", "en"): (
        (
            "What is {x}?",
            "Calculate {x}.",
            "How much is {x}?",
            "Please calculate {x}.",
            "{x} = ?",
            "Tell me the result of {x}.",
        ),
        ("Tell me {x}.", "What is the result of {x}?", "Can you calculate {x}?"),
    ),
    ("calculator", "zh"): (
        ("{x}等于多少？", "计算{x}。", "请计算{x}。", "{x}=？", "告诉我{x}的结果。", "{x}是多少？"),
        ("请问{x}等于多少？", "{x}的结果是多少？"),
    ),
    ("search", "en"): (
        (
            "Search for {x}.",
            "Find something about {x}.",
            "Look up {x}.",
            "Please search the web for {x}.",
            "What can you find about {x}?",
            "I want to read about {x}.",
        ),
        ("Can you look up {x}?", "Please search for {x}.", "Find {x} on the web."),
    ),
    ("search", "zh"): (
        (
            "搜索{x}。",
            "帮我搜索{x}。",
            "请查一下{x}。",
            "帮我查{x}。",
            "网上有什么{x}的消息？",
            "我想了解{x}。",
        ),
        ("请搜索{x}。", "请帮我查一下{x}。", "搜索一下{x}。"),
    ),
    ("time", "en"): (
        (
            "What time is it in {x}?",
            "Tell me the time in {x}.",
            "What is the time in {x} now?",
            "Time in {x}?",
            "How late is it in {x}?",
        ),
        ("Do you know what time it is in {x}?", "What is the time in {x}?"),
    ),
    ("time", "zh"): (
        ("{x}现在几点？", "{x}几点了？", "告诉我{x}的时间。", "请问{x}现在几点？"),
        ("请问{x}几点了？", "{x}现在是几点？"),
    ),
}
