"""Files of weights and where they come from, whatever the model."""
