"""Reading files that somebody else made: nothing in them is trusted and none of it is run."""
