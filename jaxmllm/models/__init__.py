"""Flax ports of multimodal LLMs: blocks are NNX modules; what runs them is pure functions of a params pytree."""
