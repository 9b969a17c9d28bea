"""Fast prefill and decoding of teachers and hybrids: fused kernels, states in place, one CUDA graph per token."""
