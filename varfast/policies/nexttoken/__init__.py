"""What the families that sample one token after the other have in common."""
