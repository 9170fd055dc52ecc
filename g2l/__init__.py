"""The nouns that the commands share, one idea a file; imports run one way."""
