"""Where bytes live: JSON, digests and room (files), the records that say what was done (records), one run at a time
(lock), which folders are ours (ownership). Files that are whole or absent come from aesthetic.files."""
