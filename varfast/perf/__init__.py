"""Where a step's time and memory go, and what a device can do."""
