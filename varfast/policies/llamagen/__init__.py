"""LlamaGen: a class-conditional Llama-like transformer over the tokens of a VQ-VAE."""
