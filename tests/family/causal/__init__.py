"""A family outside jvdiff/ that streams and trains. Its transformer's type has the name of another family's."""
