"""What single errors do, found without drawing campaigns."""
