"""Whether a backend computes what the definitions say: a table of every op, for whoever brings a device.

`python -m qwenrt.conformance --device npu` compares each op of the backend with its definition and prints what serves,
how far it is and how far it may be. ``cases`` says what is tried, ``bounds`` how far a result may be and why.
"""
