"""What others made and use: weights of released models, and their libraries."""
