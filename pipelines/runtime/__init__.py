"""What runs on Ray, and what is seen of it."""
