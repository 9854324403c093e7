"""The parts of `scripts/gpu_check.py`. They run in child processes: a wrong kernel can hang or end its process."""
