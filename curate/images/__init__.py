"""Bytes from anywhere -> an upright sRGB image -> resized, encoded.

From outside: `process` (ImagesConfig, ProcessedImage, process), `decode` (decode, decode_alpha), `header` (probe) and
`resize` (perceptual_hash). `segments` takes files apart; `isolated` decodes in a process that may die.
"""

import cv2

cv2.setNumThreads(1)  # one image, one core: callers bring the threads
