"""Janus-Pro: a language model that is conditioned on text and draws the tokens of a VQ-VAE."""
