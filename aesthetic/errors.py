"""What a user did wrong."""

from __future__ import annotations


class UserError(Exception):
    """Bad input, a bad recipe, or a machine that lacks something: the message names it and what to do (exit code 2)."""
