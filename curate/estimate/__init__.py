"""What a run spends, and what a larger one would: `spent` counts in the workers, `rates` adds up what their records
say, `whole` projects a trial to its list, `fleet` puts rates and kinds of machines together. Starts nothing.
"""
