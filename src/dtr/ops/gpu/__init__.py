"""Triton kernels for NVIDIA GPUs. Nothing here is imported before a kernel is to run: Triton may be missing."""
