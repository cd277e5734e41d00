"""A door that stands where it always stood: `python -m jvdiff.data.digits`; the room behind it is `jvdiff.digits`."""
