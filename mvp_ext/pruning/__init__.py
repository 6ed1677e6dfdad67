"""The method: tasks, training, scores, iterative pruning, similarity, the vote, the zoo."""
