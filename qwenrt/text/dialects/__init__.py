"""The dialects that clients speak: their requests as one Ask, the model's answers as their bodies and events.

No dialect knows another, a socket or a model: `ask.py` is what they all become, `answers.py` what they all write.
"""
