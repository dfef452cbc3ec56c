"""What a model is: its description, its checkpoint, and its family."""
