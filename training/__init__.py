"""Data, fine-tuning, calibration, evaluation and benchmarks, each runnable with `python -m`."""
