"""A family that is small in numbers and has what large ones have; docs/adding_a_family.md was written along it."""
