"""What the families that draw one token after the other share: transformer, engine, tokenizers."""
