"""Write an HTML report of a finished OUT."""
