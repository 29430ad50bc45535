"""Triton kernels and the functions that launch them. No policy, no validation."""
