"""Captions written anew by models that see: what is asked, what was answered, and what an answer is worth."""
