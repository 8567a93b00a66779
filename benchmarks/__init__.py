"""Speed and memory against the unsteered model and the eager dense reference; `python -m benchmarks.run`."""
