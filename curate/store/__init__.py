"""Where bytes live: JSON and digests (files), the records that say what was done (records), one run at a time (lock),
which folders are ours (ownership), room (disk). Files that are whole or absent come from aesthetic.files."""
