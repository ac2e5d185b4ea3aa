"""Images and texts -> vectors of one space, and the vectors of a shard.

From outside: `registry` (load_encoder, check_available, canonical_name), `base` (Encoder, unit, pixels), `embed`
(EmbedConfig, write_vectors, images_of, recovered) and `onnx` for models of one's own; `bundled`, `openclip` lie behind.
"""
