"""VAR: next-scale prediction over the token maps of a multi-scale VQ-VAE."""
