"""Many processes and machines: entries of a zoo as tasks of Ray."""
