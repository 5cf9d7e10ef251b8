"""What the questions share: checkpoints, held-out text, statistics over documents, and the page."""
