"""qwenrt and its peers on the same shapes, in turn, in one run: `python -m benchmarks` (see docs/performance.md)."""
