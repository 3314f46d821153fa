"""Suites of measurements. `python -m benchmarks.cpu` measures, `python -m benchmarks.report` shows."""
