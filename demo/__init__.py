"""A first run without a network: real pictures, served by a real HTTP server on this machine, curated for real."""
