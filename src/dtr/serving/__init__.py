"""Hybrids in vLLM: a plugin that vLLM finds by itself, and the command that serves a folder; only here is vllm used."""
