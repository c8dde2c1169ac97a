"""Where the activations of a model are, and how bounds take their place."""
