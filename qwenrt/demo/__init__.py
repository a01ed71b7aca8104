"""The built-in model: a real Qwen-1 directory of a few megabytes, and the small world it was trained on."""

# Questions that it answers, each by itself: what a newcomer is shown.
CAN_ANSWER = (
    "What is the capital of France?",
    "What is 7 + 5?",
    "What does a cow say?",
    "My name is Anna.",
    "给我讲一个故事。",
)
