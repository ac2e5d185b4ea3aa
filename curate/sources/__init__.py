"""What a LIST can be, from lists of URLs to folders of images and of vectors -> the shard plan."""
