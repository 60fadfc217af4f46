"""Optimizers and gradients, as the learner needs them."""
