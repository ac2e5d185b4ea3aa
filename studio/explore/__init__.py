"""Look at a data folder: its columns as histograms, rules with what they reject, and its images in any order.

From outside: `api` (the routes).
"""
