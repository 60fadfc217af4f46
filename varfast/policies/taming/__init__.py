"""taming-transformers: a class-conditional minGPT over the tokens of a VQGAN."""
