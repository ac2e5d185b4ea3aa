"""Captions written anew: by a server or a model here."""
