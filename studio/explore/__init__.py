"""Look at a data folder: its columns as histograms, rules with what they reject, and its images in any order.

From outside: `api.api`, and `explorer.Explorer`, which other pages ask about rows, columns and selections.
"""
