"""The training loop: `loop` takes steps, `step` is one of them, `update` computes gradients.

Imports every room but `report` and `commands`.
"""
