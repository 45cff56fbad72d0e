"""What the backward finds saved: the least extra time under a budget.

`problem` prices it, `mincut` gives the best saved set at one price per byte, `regions` tabulates
what each such level costs where, `solve` mixes them, and `search` does it until the peak fits.
"""
