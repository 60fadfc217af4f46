"""What training minimises: one file a loss."""
