"""Bytes from anywhere -> an upright sRGB image -> resized, encoded.

From outside: `process` (ImagesConfig, ProcessedImage, process, perceptual_hash), `decode` (decode, decode_alpha) and
`header` (probe). `segments` takes files apart; `isolated` decodes in a process that may die.
"""

import cv2

cv2.setNumThreads(1)  # one image, one core: callers bring the threads
