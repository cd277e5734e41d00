"""The converters: a Hugging Face repository becomes an Orbax directory (`__main__`), and back (`to_hf`); no torch."""
