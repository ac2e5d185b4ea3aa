"""Bytes from anywhere -> an upright sRGB image -> resized, encoded.

From outside: `config` (ImagesConfig), `process` (ProcessedImage, process), `decode` (decode, decode_alpha), `header`
(probe) and `resize` (perceptual_hash). `segments` takes files apart; `isolated` decodes in a process that may die.
"""
