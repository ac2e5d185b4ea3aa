"""What is computed about images: columns of the ledger. A file for each annotator; nothing else knows their names.

From outside: `base` (Annotator, TableAnnotator, ColumnSpec, ImageBatch, scores_of), `registry` (make_annotators,
load_annotator, known_annotators) and `stage` (annotate_shard, annotate_table, column_inputs).
"""
