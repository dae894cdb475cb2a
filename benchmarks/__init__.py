"""Benchmarks: what each op costs beside the PyTorch that it replaces. `python -m benchmarks --help`."""
