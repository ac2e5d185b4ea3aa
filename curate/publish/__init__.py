"""What of a data folder is given to others: packed shards, or the list of what is kept, and what is said of them.

`publication.publish` does it all; `places` are where it can go.
"""
