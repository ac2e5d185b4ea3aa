"""URLs -> bytes -> the `fetched/` files of a shard: politely, within limits, without what is denied or opted out."""
