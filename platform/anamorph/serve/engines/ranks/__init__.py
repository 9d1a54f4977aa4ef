"""One model over several processes: all share every layer, or each has some layers.

layout.py    which splits there are, which are refused
process.py   how ranks meet, and load their own slices
tensor.py    tensor parallel
stage.py     pipeline parallel: what every rank does
pipeline.py  pipeline parallel: the engine of rank 0
actors.py    the other ranks as Ray actors
"""
