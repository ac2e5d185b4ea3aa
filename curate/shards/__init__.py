"""Tars of samples, and the curated shards made of them."""
