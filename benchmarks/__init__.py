"""Questions about the phantom that take minutes: each module is one question, run as `python -m benchmarks.NAME`."""
