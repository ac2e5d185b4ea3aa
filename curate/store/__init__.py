"""Files that are whole or absent, the records that say what was done, and which folders are ours."""
