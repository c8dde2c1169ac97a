"""What protects stored bits, and what that buys."""
