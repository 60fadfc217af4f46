"""Base models made from images, and the cache that keeps them."""
