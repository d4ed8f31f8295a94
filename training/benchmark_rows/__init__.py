"""Rows of the benchmark by subject: functions `Workload -> Measurement`, named in `table.py`."""
