"""What can be cut and how: structure, masks, surgery, checkpoints. Knows no task and no zoo."""
