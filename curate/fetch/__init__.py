"""URLs -> bytes -> the `fetched/` files of a shard: politely, within limits, without what is denied or opted out.

From outside: `config` (FetchConfig), `ingest` (the fetch and images stages of a shard), `client` (Fetcher, Body),
`budget` (Budget, for an actor), `deny` (Deny) and `engine_img2dataset` (require).
"""
