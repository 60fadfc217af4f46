"""Model cards: what a model is, how it is loaded, and the metadata that the hub reads. None names this machine."""
