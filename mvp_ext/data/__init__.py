"""Images and tasks: where they come from, and the batches made of them. Knows no model."""
