"""The row: its columns, all tables as one view, the rules over them, and the verdicts."""
