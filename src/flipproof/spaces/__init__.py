"""What can be hit: spaces that number every bit."""
