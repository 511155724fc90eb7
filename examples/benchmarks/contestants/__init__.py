"""Who takes part in the contest of accuracy against bytes: one file for each family, and the arena that they share."""
