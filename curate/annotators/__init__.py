"""What is computed about images: vectors, and columns of scores."""
