"""Kernels beside those of others."""
