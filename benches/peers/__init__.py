"""Other ways to do the same jobs, written as their users would write them. One module per peer."""
