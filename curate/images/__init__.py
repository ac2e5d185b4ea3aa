"""Bytes from anywhere -> an upright sRGB image -> resized, encoded.

From outside: `config` (ImagesConfig), `process` (ProcessedImage, process, perceptual_hash), `decode` (decode,
decode_alpha) and `header` (probe). `segments` takes files apart; `isolated` decodes in a process that may die.
"""
