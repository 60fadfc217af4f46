"""Models that are trained: one folder a family."""
