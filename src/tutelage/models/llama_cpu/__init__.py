"""The Llama family written out for a CPU: layers, whole sequences, single tokens.

A faster form of what transformers computes, tried against it before it is used.
"""
