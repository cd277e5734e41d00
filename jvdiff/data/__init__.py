"""Video files, datasets and tokenizers: everything that enters or leaves as a file."""
