"""Training on curated shards. A library: it runs without Ray."""
