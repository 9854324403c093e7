"""The parts of `scripts/tune_kernels.py`."""
