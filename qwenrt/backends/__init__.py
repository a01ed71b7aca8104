"""How an op runs: one class per device over the definitions in ops/reference.py."""
