"""The study: does the vote pay? Every claim of the method tested, beside the controls that could beat it."""
