"""Bytes from anywhere -> an upright sRGB image -> resized, encoded."""
