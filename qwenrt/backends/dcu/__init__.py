"""Hygon's DCUs, which torch calls "cuda" as well: HIP devices with a toolkit (DTK), a torch and a
Triton of their own."""
