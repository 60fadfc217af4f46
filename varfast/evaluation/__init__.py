"""Numbers over many images, for the command varfast.evaluate."""
