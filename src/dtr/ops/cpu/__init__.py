"""Kernels in C++, built at first use."""
