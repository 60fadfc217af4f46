"""Labelled images, the files they come from, and what labels are called."""
