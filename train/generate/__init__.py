"""Images from a model, and how good they are."""
