"""Images that are the same."""
