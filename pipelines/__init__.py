"""Ray jobs, recipes and the command line: what runs the libraries in curate/, aesthetic/ and train/."""
