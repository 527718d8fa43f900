"""Real kills: the command in processes of its own, ended at random instants, started again, and its bytes compared."""
