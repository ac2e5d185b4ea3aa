"""What a LIST can be (lists of URLs, folders of images, vectors of others) -> the shard plan; folders as datasets.

From outside: `plan` and `planner`; `find.open_folder` and `dataset`; `vectors`; `listing` for the names of files;
`rated` and `image_vectors`: ratings joined to images and their vectors.
"""
