"""What devices may run: the fleet's TUF repository, its keys and its signatures."""
