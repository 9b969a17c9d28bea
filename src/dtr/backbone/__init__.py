"""Causal models whose attention asks transformers' attention interface: what they are made of, running their layers."""
