"""Rollouts on a GPU: static caches, one captured graph a decoding step."""
