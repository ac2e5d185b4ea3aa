"""Rating in the studio: ratings on disk at once, which images come next, and the head that learns meanwhile.

From outside: `service.RatingService`, of a data folder; `api`: its routes.
"""
