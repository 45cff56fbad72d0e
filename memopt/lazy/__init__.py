"""Logits that are not there.

`logits` is the tensor, `rows` how any of it is computed after all, `rules` which functions of
torch do not need it whole, `stamps` whether what it is made of is unchanged.
"""
