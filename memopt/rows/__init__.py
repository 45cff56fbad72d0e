"""Fused regions: rows of equal width, computed in one kernel of our own.

`select` finds them in an aten graph, `reader` makes a `RowProgram` (`ir`) of each, `kernel` and
`source` write it as Triton, `choice` measures it, and `lowering` calls it in the nodes' place.
"""
