"""Images of a data folder: thumbnails and whole ones, blurred where they are unsafe; all that is known of one; denying.

`api` has the routes, `places` finds images in tars, `shown` says which may be seen, `thumbnails` cuts them.
"""
