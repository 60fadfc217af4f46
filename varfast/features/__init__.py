"""Networks that describe images by features, and statistics of real images: for rewards and for evaluation."""
