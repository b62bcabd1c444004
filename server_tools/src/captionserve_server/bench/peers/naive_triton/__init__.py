"""A captioner on Triton as tutorials write it: a Python model that calls generate()."""
