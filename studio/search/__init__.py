"""Search a data folder's own vectors: by words, by an image of it or another, and which of its images are copies.

From outside: `api.ROUTERS`, `service.SearchService`. Vectors are compared as they lie in `embedded/`; of more than a
gigabyte of them codes of one bit a number are kept as well, and what these find is compared again.
"""
