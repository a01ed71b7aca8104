"""GGUF files: one file, or one set of parts, that holds weights, config, vocabulary and template together."""
