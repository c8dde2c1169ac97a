"""What a model answers on data, golden or faulty, whole or from a cut."""
