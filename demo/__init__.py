"""A first run without a network: real images, served by a real HTTP server on this machine, curated for real."""
